//! The parts of gRPC over HTTP/2 that the proxy uses.
//!
//! A call is one HTTP/2 stream: `POST /package.Service/Method`. Request and reply bodies are sequences of frames,
//!
//! ```text
//! +--------+-----------------------+----------------+
//! | 1 byte | 4 bytes, big-endian   | length bytes   |
//! | flag   | length                | message        |
//! +--------+-----------------------+----------------+
//! ```
//!
//! where flag 1 means that the message is compressed. These frames are independent of HTTP/2's DATA frames. A unary
//! call has exactly one in each direction. The HTTP status is always 200: the trailers `grpc-status` (0 is OK) and
//! `grpc-message` (percent-encoded) carry the result. A call that fails before its first message may send both in its
//! only HEADERS frame ("trailers-only").
//!
//! `grpc-timeout` is the RPC deadline, counted from the sending of the request: at most eight digits and one of the
//! units `H M S m u n` (hours to nanoseconds).
//!
//! Source: `doc/PROTOCOL-HTTP2.md` of grpc/grpc.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, header::CONTENT_TYPE};

/// The header with the caller's RPC deadline.
pub(crate) const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The `grpc-status` of a service that can't be reached at the moment.
const UNAVAILABLE: HeaderValue = HeaderValue::from_static("14");

/// The length of flag and length in front of each message.
pub(crate) const PREFIX: usize = 5;

/// The message of a unary body; `None` unless the body is exactly one uncompressed frame.
pub(crate) fn unary_message(body: &[u8]) -> Option<&[u8]> {
    let (flag, rest) = body.split_first()?;
    let (length, message) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    (*flag == 0 && length == message.len()).then_some(message)
}

/// A unary body with `message`; `None` if its length does not fit into the prefix.
pub(crate) fn unary_body(message: &[u8]) -> Option<Bytes> {
    let mut body = BytesMut::with_capacity(PREFIX + message.len());
    body.put_u8(0);
    body.put_u32(u32::try_from(message.len()).ok()?);
    body.put_slice(message);
    Some(body.freeze())
}

/// Reads a `grpc-timeout`.
pub(crate) fn parse_timeout(value: &HeaderValue) -> Option<Duration> {
    let (unit, digits) = value.as_bytes().split_last()?;
    if !(1..=8).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let amount = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(amount * 3600),
        b'M' => Duration::from_secs(amount * 60),
        b'S' => Duration::from_secs(amount),
        b'm' => Duration::from_millis(amount),
        b'u' => Duration::from_micros(amount),
        b'n' => Duration::from_nanos(amount),
        _ => return None,
    })
}

/// Writes a `grpc-timeout`, in the finest unit that fits, rounded down.
pub(crate) fn format_timeout(timeout: Duration) -> HeaderValue {
    let nanos = timeout.as_nanos();
    for (unit, name) in [
        (1, 'n'),
        (1_000, 'u'),
        (1_000_000, 'm'),
        (1_000_000_000, 'S'),
        (60_000_000_000, 'M'),
    ] {
        if nanos / unit <= 99_999_999
            && let Ok(value) = HeaderValue::try_from(format!("{}{name}", nanos / unit))
        {
            return value;
        }
    }
    // 190 years, the longest that fits in minutes.
    HeaderValue::from_static("99999999M")
}

/// Trailers that end a call with UNAVAILABLE.
pub(crate) fn unavailable_trailers(message: &str) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(2);
    trailers.insert(GRPC_STATUS, UNAVAILABLE);
    if let Ok(message) = HeaderValue::try_from(percent_encode(message)) {
        trailers.insert(GRPC_MESSAGE, message);
    }
    trailers
}

/// An UNAVAILABLE reply, trailers-only if `body` is empty.
pub(crate) fn unavailable<B>(message: &str, body: B) -> Response<B> {
    let mut response = Response::new(body);
    *response.headers_mut() = unavailable_trailers(message);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// Percent-encodes for `grpc-message`: everything except printable ASCII, and the percent sign.
fn percent_encode(message: &str) -> String {
    use std::fmt::Write;

    let mut out = String::with_capacity(message.len());
    for byte in message.bytes() {
        if matches!(byte, b' '..=b'~') && byte != b'%' {
            out.push(char::from(byte));
        } else {
            // Writing to a String can't fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(value: &'static str) -> Option<Duration> {
        parse_timeout(&HeaderValue::from_static(value))
    }

    #[test]
    fn every_unit_of_a_timeout_is_read() {
        assert_eq!(parse("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parse("3M"), Some(Duration::from_secs(180)));
        assert_eq!(parse("150S"), Some(Duration::from_secs(150)));
        assert_eq!(parse("150000m"), Some(Duration::from_secs(150)));
        assert_eq!(parse("99999999u"), Some(Duration::from_micros(99_999_999)));
        assert_eq!(parse("1n"), Some(Duration::from_nanos(1)));
        assert_eq!(
            parse("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
    }

    #[test]
    fn an_invalid_timeout_is_none() {
        for bad in [
            "",
            "S",
            "5",
            "5s",
            "123456789S",
            "+5S",
            "-5S",
            "5 S",
            "5.0S",
            "5SS",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_a_single_whole_uncompressed_frame_is_read() {
        assert_eq!(unary_message(&[0, 0, 0, 0, 2, 7, 8]), Some(&[7, 8][..]));
        assert_eq!(unary_message(&[0, 0, 0, 0, 0]), Some(&[][..]));
        for bad in [
            &[][..],
            &[0, 0, 0, 0],                   // half a prefix
            &[1, 0, 0, 0, 1, 7],             // compressed
            &[0, 0, 0, 0, 2, 7],             // cut
            &[0, 0, 0, 0, 1, 7, 8],          // something after it
            &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0], // two frames
            &[0, 255, 255, 255, 255, 1],
        ] {
            assert_eq!(unary_message(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn messages_are_encoded_for_a_header() {
        assert_eq!(percent_encode("50% of /run/ä\n"), "50%25 of /run/%C3%A4%0A");
    }

    proptest! {
        #[test]
        fn a_frame_reads_back(message: Vec<u8>) {
            let body = unary_body(&message).unwrap();
            prop_assert_eq!(unary_message(&body), Some(&message[..]));
        }

        #[test]
        fn a_written_timeout_reads_back_within_its_unit_and_never_longer(nanos in 0..5_999_999_940_000_000_000u64) {
            let timeout = Duration::from_nanos(nanos);
            let back = parse_timeout(&format_timeout(timeout)).unwrap();
            prop_assert!(back <= timeout);
            prop_assert!(timeout.as_secs_f64() - back.as_secs_f64() <= timeout.as_secs_f64() / 1e6 + 1e-9);
        }
    }
}
