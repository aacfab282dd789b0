//! Types that the agent may pass through bpf(2).

#![allow(unsafe_code, reason = "`aya::Pod` is an unsafe trait")]

use aya::Pod;

use crate::{
    InspectQueries, InspectResults, KubeletCgroups, Offsets, Workload, WorkloadKey, WorkloadWatch,
};

// SAFETY: integers only and no padding (the sizes are asserted), so any bytes are a valid value, and all bytes of a
// value are initialised.
unsafe impl Pod for WorkloadKey {}
// SAFETY: as above.
unsafe impl Pod for Workload {}
// SAFETY: as above.
unsafe impl Pod for WorkloadWatch {}
// SAFETY: as above.
unsafe impl Pod for Offsets {}
// SAFETY: as above.
unsafe impl Pod for InspectQueries {}
// SAFETY: as above.
unsafe impl Pod for InspectResults {}
// SAFETY: as above.
unsafe impl Pod for KubeletCgroups {}
