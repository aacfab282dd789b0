//! Reads integers from bytes that the kernel wrote, and checks the length at each read.

/// A cursor over bytes in the machine's own byte order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor<'a>(pub(super) &'a [u8]);

macro_rules! integer {
    ($name:ident) => {
        pub(super) fn $name(&mut self) -> Option<$name> {
            self.array().map($name::from_ne_bytes)
        }
    };
}

impl<'a> Cursor<'a> {
    integer!(u8);
    integer!(u16);
    integer!(u32);
    integer!(u64);

    pub(super) fn u16_be(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    /// The bytes from `offset` on.
    pub(super) fn at(self, offset: usize) -> Option<Self> {
        self.0.get(offset..).map(Self)
    }

    /// The next `n` bytes.
    pub(super) fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }
}
