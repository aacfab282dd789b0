//! Offsets of the kernel fields that the BPF programs read, from the running kernel's BTF.

use std::path::Path;

use ebb_common::Offsets;

use super::{KernelError, btf::Btf};

/// The running kernel's type information.
pub(super) const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Resolves all offsets. There is no fallback for a missing field, because a wrong offset would yield wrong counts.
///
/// # Errors
///
/// [`KernelError::NoBtf`] if `path` can't be read, [`KernelError::NoField`] for the first field that this kernel
/// lacks.
pub(super) fn resolve(path: &Path) -> Result<Offsets, KernelError> {
    let no_btf = |why: String| KernelError::NoBtf {
        path: path.to_owned(),
        why,
    };
    let blob = std::fs::read(path).map_err(|e| no_btf(e.to_string()))?;
    let btf = Btf::parse(&blob).ok_or_else(|| no_btf("it is not BTF that ebb can read".into()))?;
    let no_field = |structure: &'static str, name: &'static str| KernelError::NoField {
        structure,
        field: name,
        release: release(),
    };
    let field = |structure: &'static str, name: &'static str| {
        let offset = btf.offset_of(structure, name);
        offset.ok_or_else(|| no_field(structure, name))
    };
    let possible_net = field("sock_common", "skc_net")? + field("possible_net_t", "net")?;
    let locks = user_locks(&btf).ok_or_else(|| no_field("sock", "sk_userlocks"))?;
    Ok(Offsets {
        sock_protocol: field("sock", "sk_protocol")?,
        sock_cgrp_data: field("sock", "sk_cgrp_data")?,
        sock_cgroup_data_cgroup: field("sock_cgroup_data", "cgroup")?,
        sock_max_ack_backlog: field("sock", "sk_max_ack_backlog")?,
        sock_userlocks: locks.byte,
        sock_userlocks_shift: locks.shift,
        sock_userlocks_mask: locks.mask,
        sock_socket: field("sock", "sk_socket")?,
        cgroup_kn: field("cgroup", "kn")?,
        kernfs_node_id: field("kernfs_node", "id")?,
        sock_common_net: possible_net,
        net_ns_inum: field("net", "ns")? + field("ns_common", "inum")?,
        sock_common_family: field("sock_common", "skc_family")?,
        sock_common_state: field("sock_common", "skc_state")?,
        sock_common_hash: field("sock_common", "skc_hash")?,
        sock_common_cookie: field("sock_common", "skc_cookie")?,
        sock_common_dport: field("sock_common", "skc_dport")?,
        sock_common_daddr: field("sock_common", "skc_daddr")?,
        sock_common_rcv_saddr: field("sock_common", "skc_rcv_saddr")?,
        sock_common_v6_daddr: field("sock_common", "skc_v6_daddr")?,
        sock_common_v6_rcv_saddr: field("sock_common", "skc_v6_rcv_saddr")?,
        inet_sock_sport: field("inet_sock", "inet_sport")?,
        icsk_bind_hash: field("inet_connection_sock", "icsk_bind_hash")?,
        icsk_ack_lrcvtime: field("inet_connection_sock", "icsk_ack.lrcvtime")?,
        icsk_rto: field("inet_connection_sock", "icsk_rto")?,
        icsk_retransmits: field("inet_connection_sock", "icsk_retransmits")?,
        icsk_probes_out: field("inet_connection_sock", "icsk_probes_out")?,
        icsk_backoff: field("inet_connection_sock", "icsk_backoff")?,
        bind_bucket_fastreuse: field("inet_bind_bucket", "fastreuse")?,
        tcp_sock_rcv_nxt: field("tcp_sock", "rcv_nxt")?,
        tcp_sock_copied_seq: field("tcp_sock", "copied_seq")?,
        tcp_sock_snd_wl1: field("tcp_sock", "snd_wl1")?,
        tcp_sock_write_seq: field("tcp_sock", "write_seq")?,
        tcp_sock_snd_una: field("tcp_sock", "snd_una")?,
        tcp_sock_lsndtime: field("tcp_sock", "lsndtime")?,
        tcp_sock_rcv_tstamp: field("tcp_sock", "rcv_tstamp")?,
        tcp_sock_bytes_received: field("tcp_sock", "bytes_received")?,
        tcp_sock_bytes_acked: field("tcp_sock", "bytes_acked")?,
        tcp_sock_delivered_mstamp: field("tcp_sock", "delivered_mstamp")?,
        socket_inode: field("socket_alloc", "vfs_inode")? - field("socket_alloc", "socket")?
            + field("inode", "i_ino")?,
    })
}

/// A field that lies within one byte.
struct Bits {
    byte: u32,
    shift: u32,
    mask: u32,
}

/// Finds `sk_userlocks`: a byte, or a bit field on kernels before about 6.7 (include/net/sock.h).
fn user_locks(btf: &Btf<'_>) -> Option<Bits> {
    let field = btf.field("sock", "sk_userlocks")?;
    let size = if field.size == 0 { 8 } else { field.size };
    let shift = field.bits % 8;
    (shift + size <= 8).then_some(Bits {
        byte: field.bits / 8,
        shift,
        mask: (1 << size) - 1,
    })
}

/// Checks that all fields exist, and the tracepoint's type: the verifier checks a tp_btf program against
/// `btf_trace_NAME` (`__BPF_DECLARE_TRACE` in include/trace/bpf_probe.h).
///
/// # Errors
///
/// As [`resolve`], and [`KernelError::TooOld`].
pub(super) fn check_support(path: &Path) -> Result<(), KernelError> {
    const TRACEPOINT: &str = "btf_trace_inet_sock_set_state";
    check_release(&release())?;
    resolve(path)?;
    let found = std::fs::read(path)
        .ok()
        .and_then(|blob| Some(Btf::parse(&blob)?.has_typedef(TRACEPOINT)));
    if found == Some(true) {
        return Ok(());
    }
    Err(KernelError::NoBtf {
        path: path.to_owned(),
        why: format!("it has no {TRACEPOINT}, the tracepoint that ebb attaches to"),
    })
}

/// The first version whose `sock_cgroup_data` has a pointer to the cgroup. Before, it is a tagged word, which BPF
/// programs can't follow.
pub(crate) const FIRST_KERNEL: (u32, u32) = (5, 15);

/// # Errors
///
/// [`KernelError::TooOld`]. A release that can't be parsed passes.
pub(super) fn check_release(release: &str) -> Result<(), KernelError> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse::<u32>().ok();
    match number().zip(number()) {
        Some(version) if version < FIRST_KERNEL => Err(KernelError::TooOld {
            release: release.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// `uname -r`.
pub(super) fn release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_has_every_field_at_a_plausible_offset() {
        let o = resolve(Path::new(VMLINUX_BTF)).unwrap();
        // Every kernel since 3.x has the addresses first, and daddr before rcv_saddr.
        assert_eq!(o.sock_common_daddr, 0);
        assert_eq!(o.sock_common_rcv_saddr, 4);
        assert!(o.sock_common_family > o.sock_common_dport);
        assert!(o.tcp_sock_rcv_nxt > o.icsk_ack_lrcvtime);
        assert!(o.icsk_ack_lrcvtime > o.icsk_bind_hash);
        assert!(o.sock_userlocks_mask >= 0xf);
        assert!(o.sock_cgrp_data > o.sock_protocol || o.sock_cgrp_data > 100);
        assert_ne!(o.sock_common_v6_daddr, o.sock_common_v6_rcv_saddr);
        assert_ne!(o.net_ns_inum, 0);
    }

    #[test]
    fn kernels_before_5_15_are_refused_in_one_line() {
        let e = check_release("5.10.0-30-amd64").unwrap_err().to_string();
        assert_eq!(
            e,
            "Linux 5.10.0-30-amd64 is too old: ebb needs Linux 5.15 or later"
        );
        assert!(check_release("4.19.0").is_err());
        for supported in ["5.15.0-1-cloud", "6.1.0-18-amd64", "7.0-rc1", "?"] {
            check_release(supported).unwrap();
        }
    }

    #[test]
    fn this_kernel_is_supported() {
        check_support(Path::new(VMLINUX_BTF)).unwrap();
    }

    #[test]
    fn a_file_that_is_not_btf_is_refused_by_name() {
        let e = resolve(Path::new("/proc/version")).unwrap_err();
        assert!(e.to_string().contains("/proc/version"), "{e}");
    }
}
