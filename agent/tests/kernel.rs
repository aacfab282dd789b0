//! scratch
use ebb::{kernel::*, pods::Scope};
use std::net::*;
#[tokio::main]
async fn main() {
    let l = TcpListener::bind("127.0.0.1:0").unwrap();
    let c0 = TcpStream::connect(l.local_addr().unwrap()).unwrap();
    let (s0, _) = l.accept().unwrap();
    let t = std::time::Instant::now();
    let (tracker, mut rx) = match Tracker::start(Options {
        bpf_log: std::env::args().nth(1).is_some(),
    }) {
        Ok(t) => t,
        Err(e) => {
            let mut e: Option<&dyn std::error::Error> = Some(&e);
            while let Some(x) = e {
                println!("E {x}");
                e = x.source();
            }
            return;
        }
    };
    println!("started in {:?}", t.elapsed());
    println!("{:?}", tracker.counts());
    let scope = Scope::Netns {
        inode: Netns::of_process(std::process::id()).unwrap().inode(),
        pid: std::process::id(),
    };
    tracker.watch(&scope).unwrap();
    let c1 = TcpStream::connect(l.local_addr().unwrap()).unwrap();
    let look = tracker.look(&scope).await.unwrap();
    println!(
        "{:#?}",
        look.samples
            .iter()
            .filter(|s| s.local == l.local_addr().unwrap())
            .collect::<Vec<_>>()
    );
    drop((c0, s0, c1, l));
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    println!("{:?} {:?}", tracker.counts(), tracker.losses());
    while let Ok(e) = rx.try_recv() {
        println!("{e:?}");
    }
}
