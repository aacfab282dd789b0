//! The programs, what the doctor says about them, and how their stops end.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Result;
use ebb::host::doctor::CheckStatus::{self, Ok as Fine, Unknown, Warn};
use ebb_core::notification::SignalTarget;
use ebb_testkit::{
    http,
    kubelet::{ContainerSpec, StartedPod},
};
use tokio::{task::JoinHandle, time::timeout};
use tokio_postgres::NoTls;

use self::{
    Client::{Amqp, Http, Nothing, Postgres},
    Outcome::{Cut, Killed, Served},
};
use super::amqp::AmqpConnection;
use crate::scene::{SOON, directory};

/// The files of the cases.
const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/node/images/files");

/// How a stop ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The program finished the request and exited.
    Served,
    /// The program exited and did not finish the request.
    Cut,
    /// The program ran on, and was killed at the end of the grace period.
    Killed,
}

/// What is under way at the stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Client {
    Http,
    /// A client that is connected and idle.
    Postgres,
    /// The same, of RabbitMQ.
    Amqp,
    /// The program serves no TCP.
    Nothing,
}

pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) port: u16,
    /// The STOPSIGNAL of the image.
    signal: &'static str,
    /// `PORT` stands for the port.
    pub(super) command: &'static [&'static str],
    /// Whether the program finds its own files in /usr only.
    in_usr: bool,
    pub(super) client: Client,
    /// The status of the doctor's check, and a part of its text.
    pub(super) says: (CheckStatus, &'static str),
    pub(super) outcome: Outcome,
}

pub(super) const fn case(
    name: &'static str,
    port: u16,
    signal: &'static str,
    command: &'static [&'static str],
    says: (CheckStatus, &'static str),
    outcome: Outcome,
) -> Case {
    Case {
        name,
        port,
        signal,
        command,
        in_usr: false,
        client: Http,
        says,
        outcome,
    }
}

const fn with(client: Client, case: Case) -> Case {
    Case { client, ..case }
}

const fn in_usr(case: Case) -> Case {
    Case {
        in_usr: true,
        ..case
    }
}

pub(super) const NGINX: &[&str] = &["nginx", "-e", "stderr", "-c", "/conf/nginx.conf"];
pub(super) const FPM: &[&str] = &["php-fpm8.2", "-n", "-y", "/conf/fpm.conf"];
const FPM_TIMEOUT: &[&str] = &["php-fpm8.2", "-n", "-y", "/conf/fpm-timeout.conf"];
const APACHE: &[&str] = &["apache2", "-f", "/conf/apache.conf", "-DFOREGROUND"];
const HAPROXY: &[&str] = &["haproxy", "-W", "-db", "-f", "/conf/haproxy.cfg"];
const HAPROXY_ALONE: &[&str] = &["haproxy", "-db", "-f", "/conf/haproxy.cfg"];
const GUNICORN: &[&str] = &[
    "python3", "-m", "gunicorn", "-b", ":PORT", "--chdir", "/conf", "app:app",
];
const POSTGRES: &[&str] = &["sh", "/conf/postgres.sh"];
const RABBITMQ: &[&str] = &["sh", "/conf/rabbitmq.sh"];
const ENVOY: &[&str] = &[
    "/parts/envoy/envoy/_bin/envoy",
    "--config-path",
    "/conf/envoy.yaml",
    "--drain-strategy",
    "immediate",
    "--disable-hot-restart",
    "--concurrency",
    "1",
];

macro_rules! uwsgi {
    ($($more:literal),*) => {
        &[
            "uwsgi-core", "--plugin", "/parts/usr/lib/uwsgi/plugins/python311_plugin.so", "--wsgi-file", "/conf/app.py",
            "--master", "--http-socket", ":PORT", $($more),*
        ]
    };
}

#[rustfmt::skip]
pub(super) const SERVERS: &[Case] = &[
    // First, because its start takes the longest.
    in_usr(with(Amqp, case("rabbitmq-term", 7081, "SIGTERM", RABBITMQ,
        (Warn, "RabbitMQ closes its connections at once on SIGTERM"), Cut))),
    case("nginx-term", 7001, "SIGTERM", NGINX, (Warn, "ebb.dev/stop-signal: nginx-term=SIGQUIT"), Cut),
    case("nginx-quit", 7002, "SIGQUIT", NGINX, (Fine, "finishes its requests on SIGQUIT"), Served),
    case("fpm-term", 7011, "SIGTERM", FPM_TIMEOUT, (Warn, "ebb.dev/stop-signal: fpm-term=SIGQUIT"), Cut),
    case("fpm-quit", 7012, "SIGQUIT", FPM, (Warn, "set process_control_timeout"), Cut),
    case("fpm-timeout", 7013, "SIGQUIT", FPM_TIMEOUT, (Fine, "finishes its requests on SIGQUIT"), Served),
    case("apache-term", 7021, "SIGTERM", APACHE, (Warn, "ebb.dev/stop-signal: apache-term=SIGWINCH"), Cut),
    case("apache-winch", 7022, "SIGWINCH", APACHE, (Fine, "finishes its requests on SIGWINCH"), Served),
    case("haproxy-term", 7031, "SIGTERM", HAPROXY, (Warn, "ebb.dev/stop-signal: haproxy-term=SIGUSR1"), Cut),
    case("haproxy-usr1", 7032, "SIGUSR1", HAPROXY, (Fine, "finishes its requests on SIGUSR1"), Served),
    case("haproxy-alone", 7033, "SIGTERM", HAPROXY_ALONE, (Warn, "ebb.dev/stop-signal: haproxy-alone=SIGUSR1"), Killed),
    case("uwsgi-term", 7041, "SIGTERM", uwsgi!(), (Warn, "restarts on SIGTERM"), Killed),
    case("uwsgi-die", 7042, "SIGTERM", uwsgi!("--die-on-term"), (Warn, "gracefully_kill_them_all"), Cut),
    case("uwsgi-hook", 7043, "SIGTERM", uwsgi!("--hook-master-start", "unix_signal:15 gracefully_kill_them_all"),
        (Fine, "finishes its requests on SIGTERM"), Served),
    case("gunicorn-term", 7051, "SIGTERM", GUNICORN, (Fine, "finishes its requests on SIGTERM"), Served),
    case("gunicorn-quit", 7052, "SIGQUIT", GUNICORN, (Warn, "ebb.dev/stop-signal: gunicorn-quit=SIGTERM"), Cut),
    with(Postgres, case("postgres-term", 7061, "SIGTERM", POSTGRES, (Warn, "until its clients have left"), Killed)),
    with(Postgres, case("postgres-int", 7062, "SIGINT", POSTGRES, (Warn, "closes its connections at once"), Cut)),
    case("envoy-term", 7071, "SIGTERM", ENVOY,
        (Warn, "ebb.dev/on-drain: \"POST :ADMIN_PORT/drain_listeners?graceful\""), Cut),
];

const PYTHON: &[&str] = &["python3", "/conf/server.py", "PORT"];
pub(super) const PYTHON_DRAINS: &[&str] = &["python3", "/conf/server.py", "PORT", "drain"];
const NODE: &[&str] = &["node", "/conf/server.js", "PORT"];
const NODE_DRAINS: &[&str] = &["node", "/conf/server.js", "PORT", "drain"];
const RUBY: &[&str] = &["ruby3.1", "/conf/server.rb", "PORT"];
const RUBY_DRAINS: &[&str] = &["ruby3.1", "/conf/server.rb", "PORT", "drain"];
const DHCP: &[&str] = &[
    "/parts/usr/lib/cni/dhcp",
    "daemon",
    "-socketpath",
    "/tmp/dhcp.sock",
];
const SCRIPT: &str = "python3 /conf/server.py PORT drain; true";
const EXEC: &str = "exec python3 /conf/server.py PORT drain";
const TRAP: &str =
    "python3 /conf/server.py PORT drain & child=$!; trap 'kill $child' TERM; wait; wait";
const S6: &str =
    "mkdir -p /tmp/scan/app && cp /conf/s6-run /tmp/scan/app/run && exec s6-svscan /tmp/scan";
/// Debian's docker-init is a link to tini-static. Docker's own package has the same program under this name.
const DOCKER_INIT: &str = "cp /parts/usr/bin/tini-static /tmp/docker-init \
                           && exec /tmp/docker-init -- python3 /conf/server.py PORT drain";

/// Lays the unpacked packages over the machine's own, and runs the command in its arguments.
const IN_USR: &str = "mount -t overlay -o lowerdir=/parts/usr:/usr overlay /usr \
                      && ln -s /parts/etc/java-17-openjdk /etc && exec \"$@\"";

macro_rules! java {
    ($($option:literal)*; $($argument:literal),*) => {
        &[
            "/usr/lib/jvm/java-17-openjdk-amd64/bin/java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", $($option,)*
            "/conf/Server.java", "PORT", $($argument),*
        ]
    };
}

macro_rules! under {
    ($($init:literal),* ; $($program:expr),*) => { &[$($init),*, $($program),*] };
}

#[rustfmt::skip]
pub(super) const PROGRAMS: &[Case] = &[
    case("python", 7101, "SIGTERM", PYTHON, (Warn, "does not handle SIGTERM, and runs on"), Killed),
    case("python-drains", 7102, "SIGTERM", PYTHON_DRAINS, (Fine, "handles SIGTERM"), Served),
    case("node", 7111, "SIGTERM", NODE, (Unknown, "is then killed at the end"), Killed),
    case("node-drains", 7112, "SIGTERM", NODE_DRAINS, (Unknown, "check that the program has process.on"), Served),
    in_usr(case("java", 7171, "SIGTERM", java!(;), (Unknown, "Java exits as soon as its shutdown hooks have run"), Cut)),
    in_usr(case("java-drains", 7172, "SIGTERM", java!(; "drain"), (Unknown, "check that a shutdown hook"), Served)),
    in_usr(case("java-xrs", 7173, "SIGTERM", java!("-Xrs"; "drain"),
        (Warn, "does not handle SIGTERM, and runs on"), Killed)),
    in_usr(case("ruby", 7181, "SIGTERM", RUBY, (Unknown, "it ends at once"), Cut)),
    in_usr(case("ruby-drains", 7182, "SIGTERM", RUBY_DRAINS, (Unknown, "has trap('SIGTERM')"), Served)),
    with(Nothing, case("go", 0, "SIGTERM", DHCP, (Unknown, "runs on Go"), Cut)),
    with(Nothing, case("go-quit", 0, "SIGQUIT", DHCP, (Warn, "prints its goroutines"), Cut)),
    case("shell", 7121, "SIGTERM", &["sh", "-c", SCRIPT],
        (Warn, "ebb.dev/stop-signal: shell=SIGTERM and ebb.dev/stop-signal-to: children"), Killed),
    case("bash", 7122, "SIGTERM", &["bash", "-c", SCRIPT], (Warn, "does not pass SIGTERM on to python3.11"), Killed),
    case("shell-exec", 7123, "SIGTERM", &["sh", "-c", EXEC], (Fine, "handles SIGTERM"), Served),
    case("shell-trap", 7124, "SIGTERM", &["bash", "-c", TRAP], (Unknown, "traps SIGTERM"), Served),
    case("tini", 7131, "SIGTERM", under!("tini", "--"; "python3", "/conf/server.py", "PORT", "drain"),
        (Fine, "tini passes SIGTERM on, and python3.11 handles SIGTERM"), Served),
    case("tini-shell", 7132, "SIGTERM", under!("tini", "--"; "sh", "-c", SCRIPT),
        (Warn, "python3.11 gets no signal"), Cut),
    case("tini-python", 7133, "SIGTERM", under!("tini", "--"; "python3", "/conf/server.py", "PORT"),
        (Warn, "does not handle SIGTERM, and ends at once"), Cut),
    case("tini-node", 7134, "SIGTERM", under!("tini", "--"; "node", "/conf/server.js", "PORT"),
        (Unknown, "it ends at once"), Cut),
    case("dumb-init", 7141, "SIGTERM", under!("dumb-init"; "python3", "/conf/server.py", "PORT", "drain"),
        (Fine, "dumb-init passes SIGTERM on"), Served),
    case("dumb-init-shell", 7142, "SIGTERM", under!("dumb-init"; "sh", "-c", SCRIPT), (Warn, "ends the shell"), Cut),
    case("catatonit", 7151, "SIGTERM", under!("catatonit", "--"; "python3", "/conf/server.py", "PORT", "drain"),
        (Fine, "catatonit passes SIGTERM on"), Served),
    case("docker-init", 7152, "SIGTERM", &["sh", "-c", DOCKER_INIT], (Fine, "docker-init passes SIGTERM on"), Served),
    in_usr(case("s6", 7161, "SIGTERM", &["sh", "-c", S6], (Fine, "passes SIGTERM on"), Served)),
];

impl Case {
    /// The annotation that the doctor recommends: signals by container, and their targets.
    pub(super) fn recommended_signal(&self) -> Option<(&'static str, SignalTarget)> {
        let value = self.says.1.strip_prefix("ebb.dev/stop-signal: ")?;
        Some(
            match value.split_once(" and ebb.dev/stop-signal-to: children") {
                Some((value, _)) => (value, SignalTarget::Children),
                None => (value, SignalTarget::Main),
            },
        )
    }

    /// The request on drain that the doctor recommends. The admin port is the port with a 1 before it.
    pub(super) fn recommended_request(&self) -> Option<String> {
        let value = self.says.1.strip_prefix("ebb.dev/on-drain: ")?;
        let admin_port = format!("1{}", self.port);
        Some(value.trim_matches('"').replace("ADMIN_PORT", &admin_port))
    }

    /// The container. `parent` is a directory for its files.
    pub(super) fn container(&self, parent: &Path) -> Result<ContainerSpec> {
        let port = self.port.to_string();
        let words = self.command.iter().map(|word| word.replace("PORT", &port));
        let words: Vec<String> = words.collect();
        let words = words.iter().map(String::as_str);
        let words: Vec<&str> = match self.in_usr {
            true => ["sh", "-c", IN_USR, "sh"]
                .into_iter()
                .chain(words)
                .collect(),
            false => words.collect(),
        };
        let mut spec = ContainerSpec::host(self.name, self.signal, &words)
            .mount(files(parent, self)?, "/conf")
            .env("PYTHONPATH", "/parts/gunicorn")
            .env("PYTHONDONTWRITEBYTECODE", "1");
        if self.in_usr {
            spec.security.add.push("SYS_ADMIN".into());
        }
        Ok(match self.client {
            // PostgreSQL refuses to run as root.
            Postgres => spec.user(33),
            _ => spec,
        })
    }

    /// Begins what is under way at the stop: a request of this length, or a connection. The task tells whether it was
    /// served.
    pub(super) async fn begin(
        &self,
        pod: &StartedPod,
        length: Duration,
    ) -> Result<JoinHandle<bool>> {
        let address = pod.v4(self.port)?;
        Ok(match self.client {
            Http => tokio::spawn(async move {
                let path = format!("/slow?ms={}", length.as_millis());
                let reply = timeout(SOON, http::get(address, &path)).await;
                reply.is_ok_and(|reply| reply.is_ok_and(|r| r.status.is_success()))
            }),
            Postgres => {
                let config = format!(
                    "host={} port={} user=www-data dbname=postgres",
                    address.ip(),
                    address.port()
                );
                let (client, connection) = tokio_postgres::connect(&config, NoTls).await?;
                tokio::spawn(async move {
                    // The client leaves when the task ends.
                    let _client = client;
                    let ended = timeout(SOON, connection).await;
                    ended.is_err()
                })
            }
            Amqp => {
                let mut connection = AmqpConnection::open(address).await?;
                tokio::spawn(async move {
                    let ended = timeout(SOON, connection.until_closed()).await;
                    ended.is_err()
                })
            }
            Nothing => tokio::spawn(async { true }),
        })
    }
}

/// Copies the files of the cases, with the port of one of them.
pub(super) fn files(parent: &Path, case: &Case) -> Result<PathBuf> {
    let target = directory(parent, case.name)?;
    for entry in fs::read_dir(FILES)? {
        let entry = entry?;
        let text = fs::read_to_string(entry.path())?;
        let to = target.join(entry.file_name());
        fs::write(&to, text.replace("PORT", &case.port.to_string()))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
    }
    Ok(target)
}
