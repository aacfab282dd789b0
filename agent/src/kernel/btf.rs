//! Reading offsets of structure fields out of the kernel's BTF.
//!
//! A header, then a table of types, then a table of strings (Documentation/bpf/btf.rst). Each type is three
//! words (name, kind and number of parts, size or type) and the parts of its kind. Types are numbered from 1
//! in the order of the table, and where a type begins is known only by walking there.

use super::bytes::Bytes;

const MAGIC: u16 = 0xeb9f;

const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_TYPEDEF: u32 = 8;

/// A parsed BTF blob.
#[derive(Debug)]
pub(super) struct Btf<'a> {
    types: Bytes<'a>,
    strings: Bytes<'a>,
    /// Where each type begins in `types`; type 0 is void and has no place.
    starts: Vec<u32>,
}

/// The three words that every type begins with.
struct Type {
    name: u32,
    kind: u32,
    /// How many parts follow.
    parts: usize,
    /// Bit field sizes are in the upper byte of the members' offsets.
    kind_flag: bool,
    /// A size or a type, by kind.
    size_or_type: u32,
}

impl<'a> Btf<'a> {
    /// Indexes the types. `None` if this is no BTF of this machine's byte order, or has kinds of types that
    /// are newer than this code: then nothing behind them can be found.
    pub(super) fn parse(blob: &'a [u8]) -> Option<Self> {
        let mut header = Bytes(blob);
        if header.u16()? != MAGIC {
            return None;
        }
        header.take(2)?; // version, flags
        let header_length = header.u32()? as usize;
        let (types_at, types_length) = (header.u32()? as usize, header.u32()? as usize);
        let (strings_at, strings_length) = (header.u32()? as usize, header.u32()? as usize);
        let body = Bytes(blob).at(header_length)?;
        let mut btf = Self {
            types: Bytes(body.at(types_at)?.take(types_length)?),
            strings: Bytes(body.at(strings_at)?.take(strings_length)?),
            starts: vec![0],
        };
        let mut rest = btf.types;
        while !rest.0.is_empty() {
            let start = btf.types.0.len() - rest.0.len();
            btf.starts.push(u32::try_from(start).ok()?);
            let t = Type::read(&mut rest)?;
            rest.take(t.length_of_parts()?)?;
        }
        Some(btf)
    }

    /// Offset in bytes of a field in the structure, or typedef of one, called `structure`; also where it sits
    /// in anonymous structures and unions. `None` if it is missing or a bit field.
    pub(super) fn offset_of(&self, structure: &str, field: &str) -> Option<u32> {
        (1..self.starts.len()).find_map(|id| {
            let id = u32::try_from(id).ok()?;
            let (t, _) = self.get(id)?;
            let wanted = matches!(t.kind, KIND_STRUCT | KIND_TYPEDEF)
                && self.name(t.name)? == structure.as_bytes();
            wanted.then(|| self.member_offset(id, field))?
        })
    }

    /// Whether there is a typedef of this name.
    pub(super) fn has_typedef(&self, name: &str) -> bool {
        (1..self.starts.len()).any(|id| {
            let found = u32::try_from(id).ok().and_then(|id| self.get(id));
            found.is_some_and(|(t, _)| {
                t.kind == KIND_TYPEDEF && self.name(t.name) == Some(name.as_bytes())
            })
        })
    }

    fn member_offset(&self, id: u32, field: &str) -> Option<u32> {
        let (t, mut members) = self.get(id)?;
        match t.kind {
            KIND_TYPEDEF => return self.member_offset(t.size_or_type, field),
            KIND_STRUCT | KIND_UNION => {}
            _ => return None,
        }
        for _ in 0..t.parts {
            let (name, of, offset) = (members.u32()?, members.u32()?, members.u32()?);
            let (bits, size) = if t.kind_flag {
                (offset & 0xff_ffff, offset >> 24)
            } else {
                (offset, 0)
            };
            let name = self.name(name)?;
            if name == field.as_bytes() {
                return (size == 0 && bits % 8 == 0).then_some(bits / 8);
            }
            if name.is_empty()
                && let Some(inner) = self.member_offset(of, field)
            {
                return Some(bits / 8 + inner);
            }
        }
        None
    }

    /// A type and what follows its first three words.
    fn get(&self, id: u32) -> Option<(Type, Bytes<'a>)> {
        let start = *self.starts.get(id as usize).filter(|_| id != 0)?;
        let mut at = self.types.at(start as usize)?;
        Some((Type::read(&mut at)?, at))
    }

    fn name(&self, offset: u32) -> Option<&'a [u8]> {
        self.strings
            .at(offset as usize)?
            .0
            .split(|b| *b == 0)
            .next()
    }
}

impl Type {
    fn read(from: &mut Bytes<'_>) -> Option<Self> {
        let (name, info, size_or_type) = (from.u32()?, from.u32()?, from.u32()?);
        Some(Self {
            name,
            kind: info >> 24 & 0x1f,
            parts: (info & 0xffff) as usize,
            kind_flag: info >> 31 == 1,
            size_or_type,
        })
    }

    /// In bytes. `None` for a kind that did not exist when this was written (Linux 6.18 has up to 19).
    fn length_of_parts(&self) -> Option<usize> {
        Some(match self.kind {
            1 | 14 | 17 => 4,          // integer, variable, declaration tag
            3 => 12,                   // array
            2 | 7..=12 | 16 | 18 => 0, // pointer, forward … function, float, type tag
            KIND_STRUCT | KIND_UNION | 15 | 19 => self.parts * 12, // … data section, 64-bit enumeration
            6 | 13 => self.parts * 8, // enumeration, function prototype
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BTF with `struct outer { int a; struct { int b:3; int c; }; }` and `typedef struct outer alias`.
    fn blob() -> Vec<u8> {
        let strings = b"\0int\0outer\0a\0b\0c\0alias\0";
        let info = |kind: u32, parts: u32, flag: u32| flag << 31 | kind << 24 | parts;
        let types: Vec<u32> = [
            vec![1, info(1, 0, 0), 4, 32],
            vec![5, info(4, 2, 0), 12, 11, 1, 0, 0, 3, 32],
            vec![0, info(4, 2, 1), 8, 13, 1, 3 << 24, 15, 1, 32],
            vec![17, info(8, 0, 0), 2],
        ]
        .concat();
        let types: Vec<u8> = types.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let (types_len, strings_len) = (types.len() as u32, strings.len() as u32);
        let mut blob = MAGIC.to_ne_bytes().to_vec();
        blob.extend([1, 0]);
        for word in [24, 0, types_len, types_len, strings_len] {
            blob.extend(word.to_ne_bytes());
        }
        blob.extend(types);
        blob.extend(strings);
        blob
    }

    #[test]
    fn fields_are_found_also_in_anonymous_structures_and_through_typedefs() {
        let blob = blob();
        let btf = Btf::parse(&blob).unwrap();
        assert_eq!(btf.offset_of("outer", "a"), Some(0));
        assert_eq!(btf.offset_of("outer", "c"), Some(8));
        assert_eq!(btf.offset_of("alias", "c"), Some(8));
        assert!(btf.has_typedef("alias") && !btf.has_typedef("outer"));
    }

    #[test]
    fn bit_fields_and_missing_names_have_no_offset() {
        let blob = blob();
        let btf = Btf::parse(&blob).unwrap();
        assert_eq!(btf.offset_of("outer", "b"), None);
        assert_eq!(btf.offset_of("outer", "d"), None);
        assert_eq!(btf.offset_of("inner", "a"), None);
    }

    #[test]
    fn cut_or_foreign_bytes_are_refused_and_never_read_past_their_end() {
        let whole = blob();
        for length in 0..whole.len() {
            if let Some(btf) = Btf::parse(&whole[..length]) {
                panic!("parsed {length} of {} bytes: {btf:?}", whole.len());
            }
        }
        assert!(Btf::parse(b"\x7fELF and so on, and on, and on").is_none());
        let mut newer = whole;
        newer[24 + 7] = 20; // the kind of the first type
        assert!(Btf::parse(&newer).is_none());
    }
}
