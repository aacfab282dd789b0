//! Just enough of the protobuf wire format to find a field and to change one number in place.
//!
//! A message is a run of fields, in any order. Each begins with a tag, a varint of
//! `field number << 3 | wire type`, and the wire type says how long the value is:
//!
//! | wire type | value |
//! | --- | --- |
//! | 0 | a varint: seven bits a byte, lowest first, the top bit set on all but the last |
//! | 1 | eight bytes |
//! | 2 | a varint length and that many bytes |
//! | 5 | four bytes |
//!
//! 3 and 4 (groups) have been deprecated since before gRPC existed; here they count as malformed, as
//! does everything else that this reader is not sure about. A scalar field that occurs more than once
//! has the value of its last occurrence.
//!
//! Generated types are not used for this: decoding into them and encoding again loses the fields of
//! newer Kubernetes versions, which the runtime behind the proxy may well know.

use std::ops::Range;

/// The bytes are not a protobuf message this reader understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed protobuf message")]
pub(super) struct Malformed;

/// The value of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value<'a> {
    /// Wire type 0: integers of all kinds, booleans, enums.
    Varint(u64),
    /// Wire types 1 and 5: fixed-size numbers, which nothing here looks at.
    Fixed,
    /// Wire type 2: strings, bytes, messages, packed numbers.
    Bytes(&'a [u8]),
}

/// One field, and where its value is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field<'a> {
    /// The field's number in the message's definition.
    pub(super) number: u64,
    /// Its value.
    pub(super) value: Value<'a>,
    /// The bytes of the value within the message: after the tag; for [`Value::Bytes`] after the length.
    pub(super) at: Range<usize>,
}

/// All fields of `message`, in order.
pub(super) fn fields(message: &[u8]) -> Result<Vec<Field<'_>>, Malformed> {
    let mut reader = Reader { message, at: 0 };
    let mut fields = Vec::new();
    while reader.at < message.len() {
        fields.push(reader.field()?);
    }
    Ok(fields)
}

/// Appends `value` as a varint.
pub(super) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// `message` with the varint at `at` replaced by `value`, and every other byte as it was.
pub(super) fn with_varint(message: &[u8], at: &Range<usize>, value: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len() + 10);
    out.extend_from_slice(&message[..at.start]);
    put_varint(&mut out, value);
    out.extend_from_slice(&message[at.end..]);
    out
}

struct Reader<'a> {
    message: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn field(&mut self) -> Result<Field<'a>, Malformed> {
        let tag = self.varint()?;
        let number = tag >> 3;
        // Numbers have 29 bits and start at 1.
        if number == 0 || number > 0x1fff_ffff {
            return Err(Malformed);
        }
        let mut start = self.at;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed)?,
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| Malformed)?;
                start = self.at;
                Value::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Value::Fixed)?,
            _ => return Err(Malformed),
        };
        Ok(Field {
            number,
            value,
            at: start..self.at,
        })
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = *self.message.get(self.at).ok_or(Malformed)?;
            self.at += 1;
            // The tenth byte has room for one bit only.
            if shift == 63 && byte > 1 {
                return Err(Malformed);
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let end = self.at.checked_add(length).ok_or(Malformed)?;
        let bytes = self.message.get(self.at..end).ok_or(Malformed)?;
        self.at = end;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message;

    use super::*;

    /// A message of a later Kubernetes: the two fields we know among ones we don't.
    #[derive(Clone, PartialEq, Message)]
    struct Later {
        #[prost(string, tag = "1")]
        id: String,
        #[prost(int64, tag = "2")]
        timeout: i64,
        #[prost(fixed64, tag = "3")]
        fixed64: u64,
        #[prost(bytes = "vec", tag = "4")]
        bytes: Vec<u8>,
        #[prost(float, tag = "5")]
        float: f32,
        #[prost(sint64, tag = "536870911")]
        highest: i64,
    }

    fn any_later() -> impl Strategy<Value = Later> {
        (
            ".*",
            any::<i64>(),
            any::<u64>(),
            any::<Vec<u8>>(),
            -1e9f32..1e9,
            any::<i64>(),
        )
            .prop_map(|(id, timeout, fixed64, bytes, float, highest)| Later {
                id,
                timeout,
                fixed64,
                bytes,
                float,
                highest,
            })
    }

    proptest! {
        #[test]
        fn reads_what_prost_writes(later in any_later()) {
            let bytes = later.encode_to_vec();
            let fields = fields(&bytes).unwrap();
            let last = |number| fields.iter().rev().find(|f| f.number == number).map(|f| f.value);
            let id = later.id.as_bytes();
            prop_assert_eq!(last(1), (!id.is_empty()).then_some(Value::Bytes(id)));
            let timeout = later.timeout.cast_unsigned();
            prop_assert_eq!(last(2), (timeout != 0).then_some(Value::Varint(timeout)));
            prop_assert_eq!(last(4), (!later.bytes.is_empty()).then_some(Value::Bytes(&later.bytes)));
        }

        #[test]
        fn changes_one_field_and_nothing_else(later in any_later(), timeout in any::<i64>()) {
            prop_assume!(later.timeout != 0);
            let bytes = later.encode_to_vec();
            let at = fields(&bytes).unwrap().into_iter().find(|f| f.number == 2).unwrap().at;
            let changed = with_varint(&bytes, &at, timeout.cast_unsigned());
            prop_assert_eq!(Later::decode(&changed[..]).unwrap(), Later { timeout, ..later });
        }

        #[test]
        fn takes_any_bytes_without_panic_and_covers_them(bytes in any::<Vec<u8>>()) {
            if let Ok(fields) = fields(&bytes) {
                prop_assert_eq!(fields.last().map_or(0, |f| f.at.end), bytes.len());
            }
        }

        #[test]
        fn a_cut_message_is_malformed_or_shorter(later in any_later(), keep in 0.0..1.0f64) {
            let bytes = later.encode_to_vec();
            let cut = bytes.len() * (keep * 1000.0) as usize / 1000;
            if let Ok(some) = fields(&bytes[..cut]) {
                prop_assert!(some.len() <= fields(&bytes).unwrap().len());
            }
        }
    }

    #[test]
    fn refuses_what_it_is_not_sure_about() {
        for bad in [
            &[0x08][..],                                             // a tag without its value
            &[0x08, 0x80],                                           // a varint that does not end
            &[0x0a, 0x05, b'a'],                                     // longer than the message
            &[0x00, 0x00],                                           // field number 0
            &[0x0b, 0x0c],                                           // a group
            &[0x0e],                                                 // wire type 6
            &[0x0d, 1, 2, 3],                                        // three bytes of four
            &[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2], // 65 bits
            &[0x0a, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1], // a length beyond the address space
        ] {
            assert_eq!(fields(bad), Err(Malformed), "{bad:?}");
        }
    }

    #[test]
    fn an_empty_message_has_no_fields() {
        assert_eq!(fields(&[]), Ok(vec![]));
    }
}
