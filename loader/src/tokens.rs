//! Tokens: a run of values of a per-token column, in the type that they have on disk.
//!
//! [`Dtype`] lists the types of all per-token columns. Token ids are integers of five of them. This
//! module borrows bytes and never copies them. It reads single values and finds negative ids;
//! `fill` writes whole runs into rows.

use crate::error::Error;

/// Type of the values of a per-token column, or of a delivered array.
///
/// A saved index stores positions in [`Dtype::ALL`], so a new type goes to its end.
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
    /// Signed, 1 byte.
    I8,
    /// Signed, 2 bytes.
    I16,
    /// 0 or 1 in a byte. Arrow files pack eight of them into one.
    Bool,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// Unsigned, 8 bytes. Only per-document columns have it.
    U64,
}

/// The meaning of the bits of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DtypeKind {
    /// An integer with a sign.
    Signed,
    /// An integer without a sign.
    Unsigned,
    /// A floating-point number.
    Float,
    /// 0 or 1.
    Bool,
}

impl Dtype {
    /// Every type.
    pub const ALL: [Self; 12] = [
        Self::U8,
        Self::U16,
        Self::U32,
        Self::I32,
        Self::I64,
        Self::I8,
        Self::I16,
        Self::Bool,
        Self::F16,
        Self::F32,
        Self::F64,
        Self::U64,
    ];

    /// Bytes of one value.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 | Self::F16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::I64 | Self::F64 | Self::U64 => 8,
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
            Self::I8 => "int8",
            Self::I16 => "int16",
            Self::Bool => "bool",
            Self::F16 => "float16",
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::U64 => "uint64",
        }
    }

    /// The meaning of the type's bits.
    pub const fn kind(self) -> DtypeKind {
        match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => DtypeKind::Unsigned,
            Self::I8 | Self::I16 | Self::I32 | Self::I64 => DtypeKind::Signed,
            Self::Bool => DtypeKind::Bool,
            Self::F16 | Self::F32 | Self::F64 => DtypeKind::Float,
        }
    }

    /// Whether an integer of this type can be negative, so that ids need a check.
    pub const fn is_signed(self) -> bool {
        matches!(self.kind(), DtypeKind::Signed)
    }

    /// Whether token ids may have this type.
    pub const fn is_id(self) -> bool {
        matches!(self, Self::U8 | Self::U16 | Self::U32 | Self::I8 | Self::I16 | Self::I32 | Self::I64)
    }

    /// The types that a column may have, for messages: those of token ids, or of a further column.
    pub fn accepted(is_field: bool) -> String {
        let is_accepted = |dtype: &Self| if is_field { *dtype != Self::U64 } else { dtype.is_id() };
        let mut names: Vec<_> = Self::ALL.into_iter().filter(is_accepted).map(Self::name).collect();
        let last = names.pop().unwrap_or_default();
        format!("{} or {last}", names.join(", "))
    }

    /// The little-endian bytes of a small whole number in this type. The first [`Dtype::size`]
    /// bytes count.
    pub fn encode(self, value: i64) -> [u8; 8] {
        let mut bytes = value.to_le_bytes();
        if self == Self::F64 {
            bytes = (value as f64).to_le_bytes();
        } else if self.kind() == DtypeKind::Float {
            let wide = (value as f32).to_bits();
            // Small whole numbers lose nothing: the exponent gets another offset, the fraction
            // fewer bits.
            let narrow =
                if value == 0 { 0 } else { (wide >> 16 & 0x8000) | ((wide & 0x7fff_ffff) - (112 << 23)) >> 13 };
            bytes = u64::from(if self == Self::F16 { narrow } else { wide }).to_le_bytes();
        }
        bytes
    }
}

/// Most fields of a corpus. A saved index has room for this many types.
pub const MAX_FIELDS: usize = 8;

/// Type of the values of a per-document column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DocumentType {
    /// Numbers, or booleans.
    Number(Dtype),
    /// Strings.
    Text,
}

impl DocumentType {
    /// Name of the type, for messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Number(dtype) => dtype.name(),
            Self::Text => "string",
        }
    }
}

/// Number of values that a further column has, and their type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FieldType {
    /// One value for each token.
    PerToken(Dtype),
    /// One value for each document.
    PerDocument(DocumentType),
}

impl FieldType {
    /// The bit of a number that means one value for each document. Alone, it means strings.
    const PER_DOCUMENT: u8 = 0x40;

    /// The number that represents the type in a saved index, and between processes.
    pub fn number(self) -> u8 {
        let place = |dtype| Dtype::ALL.iter().position(|known| *known == dtype).expect("the list has every type");
        match self {
            Self::PerToken(dtype) => place(dtype) as u8 + 1,
            Self::PerDocument(DocumentType::Number(dtype)) => Self::PER_DOCUMENT | (place(dtype) as u8 + 1),
            Self::PerDocument(DocumentType::Text) => Self::PER_DOCUMENT,
        }
    }

    /// The type with a number that [`FieldType::number`] gave.
    pub fn of_number(number: u8) -> Option<Self> {
        let is_per_document = number & Self::PER_DOCUMENT != 0;
        match (number & !Self::PER_DOCUMENT).checked_sub(1) {
            None => is_per_document.then_some(Self::PerDocument(DocumentType::Text)),
            Some(place) => {
                let dtype = *Dtype::ALL.get(usize::from(place))?;
                let per_document = Self::PerDocument(DocumentType::Number(dtype));
                Some(if is_per_document { per_document } else { Self::PerToken(dtype) })
            }
        }
    }

    /// Name of the type, for messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PerToken(dtype) => dtype.name(),
            Self::PerDocument(kind) => kind.name(),
        }
    }
}

/// Types of the fields in a shard, in the order of the setting `fields`. `None` stands for a column
/// that the shard lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FieldTypes([u8; MAX_FIELDS]);

impl FieldTypes {
    /// Makes the list of these types.
    pub fn new(types: impl IntoIterator<Item = Option<FieldType>>) -> Self {
        let mut all = [0; MAX_FIELDS];
        for (number, found) in all.iter_mut().zip(types) {
            *number = found.map_or(0, FieldType::number);
        }
        Self(all)
    }

    /// The type of field `index`.
    pub fn get(self, index: usize) -> Option<FieldType> {
        FieldType::of_number(*self.0.get(index)?)
    }

    /// The numbers that represent the types in a saved index.
    pub(crate) fn numbers(self) -> [u8; MAX_FIELDS] {
        self.0
    }

    /// The types with numbers that [`FieldTypes::numbers`] gave.
    pub(crate) fn of_numbers(numbers: [u8; MAX_FIELDS]) -> Option<Self> {
        let is_known = |number: &u8| *number == 0 || FieldType::of_number(*number).is_some();
        numbers.iter().all(is_known).then_some(Self(numbers))
    }
}

/// A run of values in the type that they have on disk. The bytes may have any alignment.
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
            Dtype::I8 => self.bytes.iter().position(|id| id.cast_signed() < 0),
            Dtype::I16 => self.bytes.as_chunks::<2>().0.iter().position(|id| i16::from_le_bytes(*id) < 0),
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
            // These types have no sign, or token ids never have them.
            _ => None,
        }
    }

    /// Index of the first id from `vocab_size` on. Negative ids do not count.
    pub fn first_outside(&self, vocab_size: u64) -> Option<usize> {
        (0..self.len()).find(|index| u64::try_from(self.get(*index)).is_ok_and(|id| id >= vocab_size))
    }

    /// The value at `index`, as a 64-bit integer. A floating-point number appears as its bits.
    ///
    /// # Panics
    /// If `index` is past the end.
    pub fn get(&self, index: usize) -> i64 {
        let size = self.dtype.size();
        let b = &self.bytes[index * size..(index + 1) * size];
        match self.dtype {
            Dtype::U8 | Dtype::Bool => i64::from(b[0]),
            Dtype::I8 => i64::from(b[0].cast_signed()),
            Dtype::I16 => i64::from(i16::from_le_bytes([b[0], b[1]])),
            Dtype::U16 | Dtype::F16 => i64::from(u16::from_le_bytes([b[0], b[1]])),
            Dtype::U32 | Dtype::F32 => i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Dtype::I32 => i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            Dtype::I64 | Dtype::F64 | Dtype::U64 => {
                i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]])
            }
        }
    }
}

/// Makes the error for a file with the negative id `id`.
pub fn negative_id(id: i64) -> Error {
    Error::data(format!("token ids must not be negative: found {id}"))
}

/// Makes the error for a file with the id `id`, which is not below `vocab_size`.
pub fn id_outside(id: i64, vocab_size: u64) -> Error {
    Error::data(format!(
        "token id {id} is outside of the vocabulary: expected an id below `vocab_size` = {vocab_size}; the file is \
         damaged, or another tokenizer wrote it"
    ))
}

/// Makes the error for an attention mask that is `value` at a token.
pub fn masked_token(value: i64) -> Error {
    Error::data(format!(
        "`attention_mask` is {value} at a token: expected 1 at every token, because Forebay makes the padding itself; \
         leave the column out of `fields`, or remove the padding from the file"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_whole_numbers_have_the_bits_of_their_type() {
        let of = |dtype: Dtype, value: i64| Tokens::new(dtype, &dtype.encode(value)[..dtype.size()]).get(0);
        for value in [0, 1] {
            for dtype in Dtype::ALL.into_iter().filter(|dtype| dtype.kind() != DtypeKind::Float) {
                assert_eq!(of(dtype, value), value, "{dtype:?}");
            }
        }
        assert_eq!([of(Dtype::I8, -100), of(Dtype::I64, -100)], [-100, -100]);
        assert_eq!([0, 1, -100].map(|value| of(Dtype::F16, value)), [0, 0x3c00, 0xd640]);
        assert_eq!([0, 1, -100].map(|value| of(Dtype::F32, value)), [0, 0x3f80_0000, 0xc2c8_0000]);
    }
}
