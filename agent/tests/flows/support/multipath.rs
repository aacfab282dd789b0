//! Gives the kernel's MPTCP path manager a second address, like `ip mptcp endpoint add`.
//!
//! Generic netlink (include/uapi/linux/{genetlink,mptcp_pm}.h): find the family's number, then one request.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with,
};

const CONTROLLER: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const ADD_ADDRESS: u8 = 1;
const NESTED: u16 = 0x8000;

/// From now on a client in the calling thread's namespace opens a second subflow from `address`.
pub(crate) fn open_a_subflow_from(address: Ipv4Addr) -> Result<()> {
    let reply = ask(
        CONTROLLER,
        GET_FAMILY,
        &attribute(FAMILY_NAME, b"mptcp_pm\0"),
    )
    .context("this kernel can't do the case: it has no MPTCP path manager")?;
    let family = find(&reply, FAMILY_ID).context("no number of the family mptcp_pm")?;
    let family = u16::from_ne_bytes(family.get(..2).context("a short number")?.try_into()?);
    let mut endpoint = attribute(1, &2u16.to_ne_bytes()); // AF_INET
    endpoint.extend(attribute(3, &address.octets()));
    endpoint.extend(attribute(6, &2u32.to_ne_bytes())); // a client opens subflows from it
    ask(family, ADD_ADDRESS, &attribute(1 | NESTED, &endpoint))
        .context("adding an MPTCP endpoint")
        .map(drop)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap();
    let mut a = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    a.extend(value);
    a.resize(a.len().next_multiple_of(4), 0);
    a
}

/// Sends a request and returns the attributes of the reply, if there are any.
fn ask(family: u16, command: u8, attributes: &[u8]) -> Result<Vec<u8>> {
    const REQUEST_AND_ACK: u16 = 0x5;
    const ERROR: u16 = 2;
    let mut r = u32::try_from(20 + attributes.len())?.to_ne_bytes().to_vec();
    r.extend(family.to_ne_bytes());
    r.extend(REQUEST_AND_ACK.to_ne_bytes());
    r.extend([0; 8]);
    r.extend([command, 1, 0, 0]);
    r.extend(attributes);
    let fd = socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(netlink::GENERIC),
    )?;
    send(&fd, &r, SendFlags::empty())?;
    let mut reply = [0; 8192];
    let (n, _) = recv(&fd, reply.as_mut_slice(), RecvFlags::empty())?;
    ensure!(n >= 20, "a reply of {n} bytes");
    if u16::from_ne_bytes(reply[4..6].try_into()?) == ERROR {
        let errno = i32::from_ne_bytes(reply[16..20].try_into()?);
        ensure!(errno == 0, "{}", std::io::Error::from_raw_os_error(-errno));
        return Ok(Vec::new());
    }
    Ok(reply[20..n].to_vec())
}

fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        if kind == wanted {
            return attributes.get(4..length);
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}
