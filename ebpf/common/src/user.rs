//! What the agent may pass through bpf(2).

#![allow(unsafe_code, reason = "`aya::Pod` is an unsafe trait")]

use aya::Pod;

use crate::{
    Correction, EphemeralPorts, ListenKey, Offsets, Remembered, Watch, Workload, WorkloadKey,
};

// SAFETY: integers only, no padding (the sizes are asserted), so any bytes are a value and all bytes of a
// value are initialised.
unsafe impl Pod for WorkloadKey {}
// SAFETY: as above.
unsafe impl Pod for Workload {}
// SAFETY: as above.
unsafe impl Pod for Watch {}
// SAFETY: as above.
unsafe impl Pod for ListenKey {}
// SAFETY: as above.
unsafe impl Pod for Offsets {}
// SAFETY: as above.
unsafe impl Pod for EphemeralPorts {}
// SAFETY: as above.
unsafe impl Pod for Correction {}
// SAFETY: as above.
unsafe impl Pod for Remembered {}
