//! The HTTP/2 limits on both sides of the proxy. They are high, because both peers are root on this node, and a call
//! that hits a limit keeps the kubelet from syncing its pods.

/// Flow-control window of one stream: the most that the proxy buffers for a slow reader. Large enough to send a 16
/// MiB list in a few steps.
pub(crate) const STREAM_WINDOW: u32 = 4 << 20;

/// Flow-control window of a connection: the maximum. With a smaller one, a few slow streams could use it up and block
/// all others.
pub(crate) const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Concurrent calls on one connection, including held ones. hyper's default is 200.
pub(crate) const STREAMS: u32 = 10_000;

/// The same as a usize. Also the limit of reset streams that hyper remembers or has not accepted yet, so that a
/// kubelet may cancel all its calls at once.
pub(crate) const STREAMS_USIZE: usize = 10_000;

/// The size of all headers of a message: grpc-go's default.
pub(crate) const HEADER_LIST: u32 = 16 << 20;

/// How much of a stop request the proxy reads, in bytes: the kubelet's limit for messages.
pub(crate) const STOP_REQUEST: usize = 16 << 20;
