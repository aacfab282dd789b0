//! Compiles the bench's BPF programs.

use std::path::Path;

fn main() -> anyhow::Result<()> {
    let ebpf = Path::new(env!("CARGO_MANIFEST_DIR")).join("ebpf");
    ebb_bpf_build::compile("ebb-bench-ebpf", &ebpf)
}
