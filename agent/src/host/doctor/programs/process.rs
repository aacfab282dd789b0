//! The processes of a container, as `/proc` shows them.

use std::{
    fs::{self, File},
    io::Read as _,
    path::{Path, PathBuf},
};

use object::{Object as _, ReadCache};

use super::kind::{Kind, kind};
use crate::linux::{files::resolve_in, processes::children, signal_handling::SignalHandling};

/// How many generations of children are read: an init, its shell, the program.
const GENERATIONS: usize = 4;

/// How many children of a process are read.
const MOST_CHILDREN: usize = 64;

/// How much of a configuration file is read.
const MOST_OF_CONFIG: u64 = 1 << 20;

/// A process, and its children if it is an init or a shell.
#[derive(Clone, Debug)]
pub(in crate::host::doctor) struct Process {
    /// The file name of its executable; its `comm` if that is unknown, or busybox.
    pub(in crate::host::doctor) program: String,
    /// The words of its command line. Some programs write their title there.
    pub(super) command: Vec<String>,
    pub(in crate::host::doctor) signals: SignalHandling,
    /// Whether the Go compiler has built it.
    pub(super) is_go: bool,
    /// The text of the configuration files that its command line names, for the servers whose configuration matters.
    pub(super) config: String,
    pub(super) children: Vec<Process>,
}

impl Process {
    /// Reads a container's main process below `proc`; `None` if it is gone.
    pub(in crate::host::doctor) fn read(proc: &Path, pid: u32) -> Option<Self> {
        Self::read_to(proc, pid, GENERATIONS)
    }

    fn read_to(proc: &Path, pid: u32, generations: usize) -> Option<Self> {
        let directory = proc.join(pid.to_string());
        let signals = SignalHandling::of(proc, pid)?;
        let comm = fs::read_to_string(directory.join("comm")).ok()?;
        let exe = fs::read_link(directory.join("exe")).ok();
        let command = fs::read(directory.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command);
        let mut process = Self {
            program: program(exe.as_deref(), comm.trim_end()),
            command: words(&command),
            signals,
            is_go: is_go(&directory.join("exe")),
            config: String::new(),
            children: vec![],
        };
        let kind = kind(&process);
        if let Kind::Server(server) = kind {
            process.config = config(&directory, &server.config_files(&process.command));
        }
        if generations > 1 && matches!(kind, Kind::Init | Kind::Shell) {
            let namespace = |pid: u32| fs::read_link(proc.join(format!("{pid}/ns/pid"))).ok();
            let own = namespace(pid);
            let children = children(proc, pid).unwrap_or_default().into_iter();
            let children = children.filter(|child| namespace(*child) == own);
            process.children = children
                .filter_map(|child| Self::read_to(proc, child, generations - 1))
                .take(MOST_CHILDREN)
                .collect();
        }
        Some(process)
    }
}

/// The name of an executable. One that was replaced while it runs has the suffix ` (deleted)`.
fn program(exe: Option<&Path>, comm: &str) -> String {
    let name = exe.and_then(Path::file_name).map(|n| n.to_string_lossy());
    match name {
        Some(name) if name != "busybox" => {
            name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned()
        }
        _ => comm.to_owned(),
    }
}

fn words(cmdline: &str) -> Vec<String> {
    let words = cmdline.split('\0').filter(|word| !word.is_empty());
    words.map(|word| word.trim_end().to_owned()).collect()
}

/// Whether an executable has Go's build information (`debug/buildinfo` of Go's library reads the same section).
fn is_go(executable: &Path) -> bool {
    let Ok(file) = File::open(executable) else {
        return false;
    };
    let cache = ReadCache::new(file);
    let parsed = object::File::parse(&cache);
    parsed.is_ok_and(|elf| elf.section_by_name(".go.buildinfo").is_some())
}

/// The text of configuration files of a process, and of the files that they include (`include=/etc/x/*.conf`).
fn config(process: &Path, paths: &[PathBuf]) -> String {
    let root = process.join("root");
    let cwd = fs::read_link(process.join("cwd")).unwrap_or_default();
    let mut text = String::new();
    for path in paths {
        read_into(&root, &cwd.join(path), &mut text);
    }
    let included: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("include"))
        .filter_map(|rest| rest.trim_start().strip_prefix('='))
        .map(|path| PathBuf::from(path.trim().trim_matches('"')))
        .collect();
    for path in included {
        let is_pattern = path
            .file_name()
            .is_some_and(|n| n.as_encoded_bytes().contains(&b'*'));
        if !is_pattern {
            read_into(&root, &path, &mut text);
            continue;
        }
        let directory = path.parent().unwrap_or(Path::new("/"));
        let entries = resolve_in(&root, directory).and_then(fs::read_dir);
        for entry in entries.into_iter().flatten().flatten() {
            let name = entry.file_name();
            if path.extension() == Path::new(&name).extension() {
                read_into(&root, &directory.join(name), &mut text);
            }
        }
    }
    text
}

fn read_into(root: &Path, path: &Path, text: &mut String) {
    let file = resolve_in(root, path).and_then(File::open);
    let mut bytes = Vec::new();
    let read = file.and_then(|file| file.take(MOST_OF_CONFIG).read_to_end(&mut bytes));
    if read.is_ok() {
        text.push_str(&String::from_utf8_lossy(&bytes));
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_has_the_name_of_its_executable() {
        let of = |exe: &str| program(Some(Path::new(exe)), "comm");
        assert_eq!(of("/usr/sbin/nginx"), "nginx");
        assert_eq!(of("/usr/sbin/nginx (deleted)"), "nginx");
        assert_eq!(of("/bin/busybox"), "comm");
        assert_eq!(program(None, "comm"), "comm");
        assert_eq!(
            words("nginx: master process\0\0"),
            ["nginx: master process"]
        );
    }

    #[test]
    fn this_process_is_read_and_is_not_built_by_go() {
        let own = Process::read(Path::new("/proc"), std::process::id()).unwrap();
        assert!(!own.is_go && own.children.is_empty());
        assert!(!own.command.is_empty());
    }

    #[test]
    fn a_configuration_is_read_with_the_files_that_it_includes() {
        let container = tempfile::tempdir().unwrap();
        let root = container.path().join("root");
        fs::create_dir_all(root.join("etc/php/pool.d")).unwrap();
        std::os::unix::fs::symlink("/", container.path().join("cwd")).unwrap();
        let write = |path: &str, text: &str| fs::write(root.join(path), text).unwrap();
        write(
            "etc/php/fpm.conf",
            "[global]\ninclude=/etc/php/pool.d/*.conf\n",
        );
        write(
            "etc/php/pool.d/www.conf",
            "[global]\nprocess_control_timeout = 9\n",
        );
        write("etc/php/pool.d/www.off", "off = 1\n");
        let text = config(container.path(), &["/etc/php/fpm.conf".into()]);
        assert!(text.contains("process_control_timeout = 9"), "{text}");
        assert!(!text.contains("off"), "{text}");
    }
}
