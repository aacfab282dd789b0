//! Where the running kernel keeps the fields that the BPF programs read, from its BTF.

use std::path::Path;

use ebb_common::Offsets;

use super::{KernelError, btf::Btf};

/// The running kernel's type information.
pub(super) const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Resolves all offsets.
///
/// # Errors
///
/// [`KernelError::NoBtf`] if `path` can't be read, [`KernelError::NoField`] for the first field that this
/// kernel does not have where it is looked for. There is no fallback: a wrong offset would be a wrong count.
pub(super) fn resolve(path: &Path) -> Result<Offsets, KernelError> {
    let no_btf = |why: String| KernelError::NoBtf {
        path: path.to_owned(),
        why,
    };
    let blob = std::fs::read(path).map_err(|e| no_btf(e.to_string()))?;
    let btf = Btf::parse(&blob).ok_or_else(|| no_btf("it is not BTF that ebb can read".into()))?;
    let field = |structure: &'static str, name: &'static str| {
        btf.offset_of(structure, name)
            .ok_or_else(|| KernelError::NoField {
                structure,
                field: name,
                release: release(),
            })
    };
    let possible_net = field("sock_common", "skc_net")? + field("possible_net_t", "net")?;
    let (sock_cgroup_data_cgroup, sock_cgroup_data_is_tagged) = cgroup_pointer(&btf)?;
    Ok(Offsets {
        sock_protocol: field("sock", "sk_protocol")?,
        sock_cgrp_data: field("sock", "sk_cgrp_data")?,
        sock_cgroup_data_cgroup,
        sock_cgroup_data_is_tagged,
        cgroup_kn: field("cgroup", "kn")?,
        kernfs_node_id: field("kernfs_node", "id")?,
        sock_common_net: possible_net,
        net_ns_inum: field("net", "ns")? + field("ns_common", "inum")?,
        sock_common_family: field("sock_common", "skc_family")?,
        sock_common_state: field("sock_common", "skc_state")?,
        sock_common_num: field("sock_common", "skc_num")?,
        sock_common_dport: field("sock_common", "skc_dport")?,
        sock_common_daddr: field("sock_common", "skc_daddr")?,
        sock_common_rcv_saddr: field("sock_common", "skc_rcv_saddr")?,
        sock_common_v6_daddr: field("sock_common", "skc_v6_daddr")?,
        sock_common_v6_rcv_saddr: field("sock_common", "skc_v6_rcv_saddr")?,
        inet_sock_sport: field("inet_sock", "inet_sport")?,
        tcp_sock_rcv_nxt: field("tcp_sock", "rcv_nxt")?,
        tcp_sock_snd_wl1: field("tcp_sock", "snd_wl1")?,
        tcp_sock_delivered_mstamp: field("tcp_sock", "delivered_mstamp")?,
        tcp_sock_tcp_mstamp: field("tcp_sock", "tcp_mstamp")?,
    })
}

/// Whether all of it is there, with the tracepoint's own type: `btf_trace_NAME` is what tp_btf programs are
/// checked against (`__BPF_DECLARE_TRACE`, include/trace/bpf_probe.h).
///
/// # Errors
///
/// As [`resolve`].
pub(super) fn able(path: &Path) -> Result<(), KernelError> {
    const TRACEPOINT: &str = "btf_trace_inet_sock_set_state";
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

/// Where `sock_cgroup_data.cgroup` is, and 0; or the start of the structure, and 1, where it is still the tagged
/// union of 5.14 and before (include/linux/cgroup-defs.h), whose word holds the same pointer.
fn cgroup_pointer(btf: &Btf<'_>) -> Result<(u32, u32), KernelError> {
    let typed = btf.offset_of("sock_cgroup_data", "cgroup");
    let tagged = || btf.offset_of("sock_cgroup_data", "val");
    typed
        .map(|offset| (offset, 0))
        .or_else(|| Some((tagged()?, 1)))
        .ok_or_else(|| KernelError::NoField {
            structure: "sock_cgroup_data",
            field: "cgroup",
            release: release(),
        })
}

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
    fn this_kernel_has_every_field_and_none_at_the_same_place_as_another() {
        let o = resolve(Path::new(VMLINUX_BTF)).unwrap();
        // Facts that hold for every kernel since 3.x: addresses first, daddr before rcv_saddr.
        assert_eq!(o.sock_common_daddr, 0);
        assert_eq!(o.sock_common_rcv_saddr, 4);
        assert!(o.sock_common_num > o.sock_common_dport);
        assert!(o.sock_cgrp_data > o.sock_protocol || o.sock_cgrp_data > 100);
        assert_ne!(o.sock_common_v6_daddr, o.sock_common_v6_rcv_saddr);
        assert_ne!(o.net_ns_inum, 0);
    }

    #[test]
    fn this_kernel_is_able() {
        able(Path::new(VMLINUX_BTF)).unwrap();
    }

    #[test]
    fn a_file_that_is_not_btf_is_refused_by_name() {
        let e = resolve(Path::new("/proc/version")).unwrap_err();
        assert!(e.to_string().contains("/proc/version"), "{e}");
    }
}
