//! Reads offsets of structure fields from the kernel's BTF.
//!
//! BTF is a header, a table of types and a table of strings (Documentation/bpf/btf.rst). Each type is three words
//! (name, kind and number of parts, size or type), followed by the parts of its kind. Types are numbered from 1 in
//! the order of the table. Their lengths vary, so the start of a type is only known after parsing all types before
//! it.

use std::collections::HashMap;

use super::cursor::Cursor;

const MAGIC: u16 = 0xeb9f;

const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_TYPEDEF: u32 = 8;

/// A parsed BTF blob.
#[derive(Debug)]
pub(super) struct Btf<'a> {
    types: Cursor<'a>,
    strings: Cursor<'a>,
    /// Where each type starts in `types`. Type 0 is void and has no entry there.
    starts: Vec<u32>,
    /// Structures and typedefs by name.
    named: HashMap<&'a [u8], Vec<u32>>,
}

/// The location of a field in its structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// Its offset in bits.
    pub(super) bits: u32,
    /// Its size in bits if it is a bit field, else 0.
    pub(super) size: u32,
    /// Number of its type.
    type_id: u32,
}

/// The three words that every type starts with.
struct Type {
    name: u32,
    kind: u32,
    /// How many parts follow.
    parts: usize,
    /// Whether the upper byte of the members' offsets has the sizes of bit fields.
    kind_flag: bool,
    /// A size or a type, depending on the kind.
    size_or_type: u32,
}

impl<'a> Btf<'a> {
    /// Indexes the types. `None` if the blob is not BTF of this machine's byte order, or has a kind of type that this
    /// code does not know, since then the types after it can't be found.
    pub(super) fn parse(blob: &'a [u8]) -> Option<Self> {
        let mut header = Cursor(blob);
        if header.u16()? != MAGIC {
            return None;
        }
        header.take(2)?; // version, flags
        let header_length = header.u32()? as usize;
        let (types_at, types_length) = (header.u32()? as usize, header.u32()? as usize);
        let (strings_at, strings_length) = (header.u32()? as usize, header.u32()? as usize);
        let body = Cursor(blob).at(header_length)?;
        let mut btf = Self {
            types: Cursor(body.at(types_at)?.take(types_length)?),
            strings: Cursor(body.at(strings_at)?.take(strings_length)?),
            starts: vec![0],
            named: HashMap::new(),
        };
        let mut rest = btf.types;
        while !rest.0.is_empty() {
            let start = btf.types.0.len() - rest.0.len();
            let id = u32::try_from(btf.starts.len()).ok()?;
            btf.starts.push(u32::try_from(start).ok()?);
            let t = Type::read(&mut rest)?;
            if matches!(t.kind, KIND_STRUCT | KIND_TYPEDEF) {
                btf.named.entry(btf.name(t.name)?).or_default().push(id);
            }
            rest.take(t.length_of_parts()?)?;
        }
        Some(btf)
    }

    /// Offset in bytes of a field in the structure, or typedef of one, that is called `structure`. Finds fields in
    /// anonymous structures and unions, too. The path `a.b` is the field `b` of the structure `a`. `None` if the
    /// field is missing or a bit field.
    pub(super) fn offset_of(&self, structure: &str, path: &str) -> Option<u32> {
        let field = self.field(structure, path)?;
        (field.size == 0 && field.bits % 8 == 0).then_some(field.bits / 8)
    }

    /// As [`Self::offset_of`], but accepts bit fields.
    pub(super) fn field(&self, structure: &str, path: &str) -> Option<Field> {
        let ids = self.named.get(structure.as_bytes())?;
        ids.iter().find_map(|id| self.at_path(*id, path))
    }

    /// Whether there is a typedef of this name.
    pub(super) fn has_typedef(&self, name: &str) -> bool {
        let ids = self.named.get(name.as_bytes()).into_iter().flatten();
        let mut types = ids.filter_map(|id| self.get(*id));
        types.any(|(t, _)| t.kind == KIND_TYPEDEF)
    }

    fn at_path(&self, id: u32, path: &str) -> Option<Field> {
        let Some((first, rest)) = path.split_once('.') else {
            return self.member(id, path);
        };
        let outer = self.member(id, first)?;
        let inner = self.at_path(outer.type_id, rest)?;
        Some(Field {
            bits: outer.bits + inner.bits,
            ..inner
        })
    }

    fn member(&self, id: u32, field: &str) -> Option<Field> {
        let (t, mut members) = self.get(id)?;
        match t.kind {
            KIND_TYPEDEF => return self.member(t.size_or_type, field),
            KIND_STRUCT | KIND_UNION => {}
            _ => return None,
        }
        for _ in 0..t.parts {
            let (name, type_id, offset) = (members.u32()?, members.u32()?, members.u32()?);
            let (bits, size) = if t.kind_flag {
                (offset & 0xff_ffff, offset >> 24)
            } else {
                (offset, 0)
            };
            let name = self.name(name)?;
            if name == field.as_bytes() {
                return Some(Field {
                    bits,
                    size,
                    type_id,
                });
            }
            if name.is_empty()
                && let Some(inner) = self.member(type_id, field)
            {
                return Some(Field {
                    bits: bits + inner.bits,
                    ..inner
                });
            }
        }
        None
    }

    /// The first three words of a type, and the bytes after them.
    fn get(&self, id: u32) -> Option<(Type, Cursor<'a>)> {
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
    fn read(from: &mut Cursor<'_>) -> Option<Self> {
        let (name, info, size_or_type) = (from.u32()?, from.u32()?, from.u32()?);
        Some(Self {
            name,
            kind: info >> 24 & 0x1f,
            parts: (info & 0xffff) as usize,
            kind_flag: info >> 31 == 1,
            size_or_type,
        })
    }

    /// In bytes. `None` for an unknown kind (Linux 6.18 has kinds up to 19).
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

    /// BTF with `struct outer { int a; struct { int b:3; int c; }; }`, `typedef struct outer alias` and
    /// `struct whole { int a; alias outer; }`.
    fn blob() -> Vec<u8> {
        let strings = b"\0int\0outer\0a\0b\0c\0alias\0whole\0";
        let info = |kind: u32, parts: u32, flag: u32| flag << 31 | kind << 24 | parts;
        let types: Vec<u32> = [
            vec![1, info(1, 0, 0), 4, 32],
            vec![5, info(4, 2, 0), 12, 11, 1, 0, 0, 3, 32],
            vec![0, info(4, 2, 1), 8, 13, 1, 3 << 24, 15, 1, 32],
            vec![17, info(8, 0, 0), 2],
            vec![23, info(4, 2, 0), 16, 11, 1, 0, 5, 4, 32],
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
        assert_eq!(btf.offset_of("whole", "outer.c"), Some(12));
        assert!(btf.has_typedef("alias") && !btf.has_typedef("outer"));
    }

    #[test]
    fn bit_fields_and_missing_names_have_no_offset() {
        let blob = blob();
        let btf = Btf::parse(&blob).unwrap();
        assert_eq!(btf.offset_of("outer", "b"), None);
        let bits = btf.field("outer", "b").map(|f| (f.bits, f.size));
        assert_eq!(bits, Some((32, 3)));
        assert_eq!(btf.offset_of("outer", "d"), None);
        assert_eq!(btf.offset_of("inner", "a"), None);
    }

    #[test]
    fn truncated_or_foreign_bytes_are_refused_and_not_read_past_their_end() {
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
