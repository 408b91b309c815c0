//! Tokens: a run of token ids in the type that they have on disk.
//!
//! Ids are little-endian integers of one of five types. This module borrows their bytes and never
//! copies them. It reads single ids and finds negative ones; `fill` widens whole runs into rows.

use crate::error::{Error, Result};

/// Integer type of the token ids of a shard, or of a delivered array.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// Unsigned, 1 byte.
    U8,
    /// Unsigned, 2 bytes.
    U16,
    /// Unsigned, 4 bytes.
    U32,
    /// Signed, 4 bytes.
    I32,
    /// Signed, 8 bytes.
    I64,
}

impl Dtype {
    /// Bytes of one value.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::U32 | Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    /// NumPy's name of the type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::U8 => "uint8",
            Self::U16 => "uint16",
            Self::U32 => "uint32",
            Self::I32 => "int32",
            Self::I64 => "int64",
        }
    }

    /// Whether a value of this type can be negative, so that ids need a check.
    pub const fn is_signed(self) -> bool {
        matches!(self, Self::I32 | Self::I64)
    }
}

/// A run of token ids in the type that they have on disk. The bytes may have any alignment.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
}

impl<'a> Tokens<'a> {
    /// Interprets little-endian `bytes` as token ids. `bytes` must hold a whole number of values.
    pub fn new(dtype: Dtype, bytes: &'a [u8]) -> Self {
        debug_assert_eq!(bytes.len() % dtype.size(), 0);
        Self { dtype, bytes }
    }

    /// Type of the ids on disk.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Whether the run has no ids.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The little-endian bytes of the ids.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The ids in `range`, which counts from the start of this run.
    ///
    /// # Panics
    /// If `range` reaches past the end.
    #[must_use]
    pub fn slice(&self, range: std::ops::Range<usize>) -> Self {
        let size = self.dtype.size();
        Self { dtype: self.dtype, bytes: &self.bytes[range.start * size..range.end * size] }
    }

    /// Index of the first negative id. Shards whose ids were never checked need this.
    pub fn first_negative(&self) -> Option<usize> {
        // Joining the sign bits by OR first keeps the common case at memory speed.
        match self.dtype {
            Dtype::I32 => {
                let ids = self.bytes.as_chunks::<4>().0;
                let any = ids.iter().fold(0, |all, id| all | i32::from_le_bytes(*id));
                if any < 0 { ids.iter().position(|id| i32::from_le_bytes(*id) < 0) } else { None }
            }
            Dtype::I64 => {
                let ids = self.bytes.as_chunks::<8>().0;
                let any = ids.iter().fold(0, |all, id| all | i64::from_le_bytes(*id));
                if any < 0 { ids.iter().position(|id| i64::from_le_bytes(*id) < 0) } else { None }
            }
            Dtype::U8 | Dtype::U16 | Dtype::U32 => None,
        }
    }

    /// The id at `index`, widened to 64 bits.
    ///
    /// # Panics
    /// If `index` is past the end.
    pub fn get(&self, index: usize) -> i64 {
        let size = self.dtype.size();
        let b = &self.bytes[index * size..(index + 1) * size];
        match self.dtype {
            Dtype::U8 => i64::from(b[0]),
            Dtype::U16 => i64::from(u16::from_le_bytes([b[0], b[1]])),
            Dtype::U32 => i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Dtype::I32 => i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Dtype::I64 => i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
        }
    }

    /// Fails on the first negative id, with its value and index.
    pub fn check_ids(&self) -> Result<()> {
        match self.first_negative() {
            None => Ok(()),
            Some(at) => Err(Error::data(format!(
                "token ids must not be negative: found {} at token {at} of the run read",
                self.get(at)
            ))),
        }
    }
}
