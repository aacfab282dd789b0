//! The command line of the plugin: that of `ebb`, with the flags of the cluster.

use std::ffi::OsString;

use clap::{Args as _, Command, CommandFactory as _};

use super::{Cli, ClusterFlags, NAME};

/// Verbs about the host that they run on. `kubectl ebb` refuses them.
const OF_THE_HOST: [&str; 5] = ["agent", "install-cri", "uninstall-cri", "completion", "man"];

/// The flags of [`ClusterFlags`]. Each has a value.
const CLUSTER_FLAGS: [&str; 4] = ["--context", "--kubeconfig", "--node", "--agent-namespace"];

pub(super) fn command() -> Command {
    let ebb = OF_THE_HOST.into_iter().fold(Cli::command(), |ebb, verb| {
        ebb.mut_subcommand(verb, |verb| verb.hide(true))
    });
    ClusterFlags::augment_args(ebb)
        .name(NAME)
        .bin_name("kubectl ebb")
        .about("Lets Kubernetes pods end without cutting off their clients: all nodes of a cluster")
}

/// The arguments that are for the agent's `ebb`.
pub(super) fn without_cluster_flags(args: &[OsString]) -> Vec<String> {
    let mut rest = args.iter().map(|arg| arg.to_string_lossy().into_owned());
    let mut kept = Vec::new();
    while let Some(arg) = rest.next() {
        let flag = arg.split_once('=').map_or(arg.as_str(), |(flag, _)| flag);
        if !CLUSTER_FLAGS.contains(&flag) {
            kept.push(arg);
        } else if flag == arg {
            // The value is the next argument.
            let _ = rest.next();
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_that_are_left_out_are_those_of_the_cluster() {
        let command = ClusterFlags::augment_args(Command::new("x"));
        let longs = command.get_arguments().filter_map(|arg| arg.get_long());
        let longs: Vec<_> = longs.map(|long| format!("--{long}")).collect();
        assert_eq!(longs, CLUSTER_FLAGS);
    }

    #[test]
    fn the_command_line_is_valid() {
        command().debug_assert();
    }
}
