//! The demo's pod and its clients.

use std::{fs, net::SocketAddr, time::Duration};

use anyhow::Result;
use ebb_testkit::{
    Node,
    clients::{ClientLoad, Clients},
    http,
    kubelet::{ContainerSpec, Kubelet, PodSpec, StartedPod},
};

/// The pod's terminationGracePeriodSeconds.
pub(crate) const GRACE: Duration = Duration::from_secs(30);

/// How long new connections arrive after the stop began: endpoints, kube-proxies and balancers are updated with a delay.
const STALE_FOR: Duration = Duration::from_secs(3);

/// nginx serves files and forwards `/api/` to a slow application.
const NGINX: &str = "\
server {
    listen 8080;
    listen [::]:8080;
    root /srv;
    location /api/ {
        proxy_pass http://127.0.0.1:9000/;
        proxy_http_version 1.1;
    }
}
";

/// The size of a file that takes ten seconds at the clients' rate.
const DOWNLOAD: usize = 10 << 20;
const DOWNLOAD_RATE: u64 = 1 << 20;

/// Runs the pod: nginx, its slow upstream, and an application that serves one connection at a time, so that its clients
/// wait in its accept backlog.
pub(crate) async fn pod(node: &Node, kubelet: &Kubelet, name: &str) -> Result<StartedPod> {
    let conf = node.directory("conf")?;
    fs::write(conf.join("default.conf"), NGINX)?;
    let files = node.directory("srv")?;
    fs::write(files.join("download"), vec![b'x'; DOWNLOAD])?;
    fs::write(files.join("index.html"), "hello\n")?;
    let spec = PodSpec::new(name)
        .grace(GRACE)
        .container(
            ContainerSpec::nginx("nginx")
                .mount(&conf, "/etc/nginx/conf.d")
                .mount(&files, "/srv"),
        )
        .container(ContainerSpec::fixture(
            "upstream",
            &["serve", "--port", "9000"],
        ))
        .container(ContainerSpec::fixture(
            "one-by-one",
            &["serve", "--port", "8081", "--one-by-one", "--delay", "250"],
        ));
    let pod = kubelet.run(&spec).await?;
    for port in [8080, 8081, 9000] {
        http::until_open(pod.v4(port)?, Duration::from_secs(10)).await?;
    }
    Ok(pod)
}

/// Starts the clients that are busy when the stop comes, and waits until they are.
pub(crate) async fn clients(pod: &StartedPod) -> Result<Clients> {
    let (web, queue) = (pod.v4(8080)?, pod.v4(8081)?);
    let mut clients = Clients::new();
    clients.start(
        web,
        ClientLoad::Download {
            path: "/download".into(),
            rate: Some(DOWNLOAD_RATE),
            clients: 2,
        },
    );
    clients.start(
        web,
        ClientLoad::Slow {
            path: "/api/slow?ms=5000".into(),
            clients: 8,
        },
    );
    clients.start(
        pod.v6(8080)?,
        ClientLoad::Idle {
            path: "/".into(),
            quiet: Duration::from_secs(8),
            clients: 6,
        },
    );
    clients.start(
        queue,
        ClientLoad::Backlog {
            path: "/".into(),
            clients: 12,
        },
    );
    clients.in_place().await;
    Ok(clients)
}

/// Starts the client that keeps opening connections after the stop.
pub(crate) fn stale(clients: &mut Clients, web: SocketAddr) {
    clients.start(
        web,
        ClientLoad::Stale {
            path: "/".into(),
            every: Duration::from_millis(100),
            during: STALE_FOR,
        },
    );
}
