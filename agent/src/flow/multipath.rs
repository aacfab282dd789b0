//! The subflows of an MPTCP connection, put together: one connection is one flow.
//!
//! To the kernel's tables each subflow is a TCP socket. Once the connection is accepted, all of them belong to the
//! one socket that the application has (`mptcp_sock_graft` in net/mptcp/protocol.h), so they show its inode, which
//! no two other sockets share. Subflows without an inode (not accepted, or closed) can't be told to belong together,
//! and stay flows of their own.

use std::collections::HashMap;

use super::{Flow, classify::FlowState};

/// Makes one flow of those that have the same inode, in the order of the first of each. It is live if any of them
/// is, and as old as the oldest.
pub(super) fn merge(subflows: impl Iterator<Item = (u32, Flow)>) -> Vec<Flow> {
    let (inodes, subflows): (Vec<_>, Vec<_>) = subflows.unzip();
    // Few connections are MPTCP's.
    let mut shared = inodes.clone();
    shared.sort_unstable();
    if !shared.windows(2).any(|two| two[0] == two[1] && two[0] != 0) {
        return subflows;
    }
    let mut flows: Vec<Flow> = Vec::new();
    let mut places = HashMap::new();
    for (inode, flow) in inodes.into_iter().zip(subflows) {
        match places
            .get(&inode)
            .and_then(|place: &usize| flows.get_mut(*place))
        {
            Some(whole) if inode != 0 && whole.direction == flow.direction => join(whole, flow),
            _ => {
                places.insert(inode, flows.len());
                flows.push(flow);
            }
        }
    }
    flows
}

/// Names the connection by one subflow, the same in each look for as long as that one is there: the first that was
/// made of those that hold a drain, if any does.
fn join(whole: &mut Flow, mut subflow: Flow) {
    if (subflow.exempt.is_some(), subflow.cookie.0) < (whole.exempt.is_some(), whole.cookie.0) {
        std::mem::swap(whole, &mut subflow);
    }
    // What does not hold a drain does not make what does live.
    if whole.state == FlowState::Idle && whole.exempt == subflow.exempt {
        whole.state = subflow.state;
    }
    whole.age = whole.age.max(subflow.age);
    whole.since = whole.since.max(subflow.since);
    whole.bytes_in += subflow.bytes_in;
    whole.bytes_out += subflow.bytes_out;
    whole.quiet_for = whole.quiet_for.min(subflow.quiet_for);
    whole.others.push(subflow.cookie);
    whole.others.append(&mut subflow.others);
}
