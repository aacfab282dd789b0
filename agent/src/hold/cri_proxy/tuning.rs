//! The limits of HTTP/2, both sides of the proxy. They are there against strangers; both peers here
//! are root on this node, and a limit that is hit is a node that does not sync its pods.

/// Flow-control window of one stream: what a reader that has stopped reading can make the proxy keep.
/// Large enough that a 16 MiB list is not sent in many small steps.
pub(super) const STREAM_WINDOW: u32 = 4 << 20;

/// Flow-control window of a connection: the largest there is. Back pressure belongs to the stream that
/// causes it; with a smaller one, some slow streams could use it up and block all others.
pub(super) const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Calls at once on one connection. A held call is one of them, and hyper would allow 200.
pub(super) const STREAMS: u32 = 10_000;

/// The same for settings that want a usize. Streams that were reset are remembered, and may wait to be
/// accepted, as often as there can be streams: a kubelet that cancels all its calls at once is no attack.
pub(super) const STREAMS_USIZE: usize = 10_000;

/// All headers of a message together: grpc-go's own default.
pub(super) const HEADER_LIST: u32 = 16 << 20;

/// Requests that are looked into are read up to this size, the limit of the kubelet's messages.
pub(super) const STOP_REQUEST: usize = 16 << 20;
