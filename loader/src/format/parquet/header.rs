//! Header: parses page headers, which are structs of Thrift's compact protocol.
//!
//! Reads the few fields that a walk over the pages needs, and skips all others. The parquet crate
//! keeps its own parser private. This parser never reads past its slice. It distinguishes a header
//! that is cut off from a damaged one, so that the caller can come back with more bytes.

/// Encodings by their numbers in the format's Thrift file.
pub(super) mod code {
    pub(in crate::format::parquet) const PLAIN: i32 = 0;
    pub(in crate::format::parquet) const PLAIN_DICTIONARY: i32 = 2;
    pub(in crate::format::parquet) const RLE: i32 = 3;
    pub(in crate::format::parquet) const DELTA_BINARY_PACKED: i32 = 5;
    pub(in crate::format::parquet) const DELTA_LENGTH_BYTE_ARRAY: i32 = 6;
    pub(in crate::format::parquet) const DELTA_BYTE_ARRAY: i32 = 7;
    pub(in crate::format::parquet) const RLE_DICTIONARY: i32 = 8;
    pub(in crate::format::parquet) const BYTE_STREAM_SPLIT: i32 = 9;
}

/// Header of a data page, of either version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DataHeader {
    pub(super) num_values: i32,
    pub(super) encoding: i32,
    pub(super) def_encoding: i32,
    pub(super) rep_encoding: i32,
    /// Fields that only version 2 has.
    pub(super) v2: Option<HeaderV2>,
}

/// Byte lengths of the levels, and whether the values are compressed. Only pages of version 2 have
/// these fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct HeaderV2 {
    pub(super) rep_bytes: i32,
    pub(super) def_bytes: i32,
    pub(super) compressed: bool,
}

/// Type of a page, with the fields of its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageKind {
    Data(DataHeader),
    Dictionary {
        num_values: i32,
        encoding: i32,
    },
    /// Index pages and page types of later versions. The walk skips them.
    Other,
}

/// One parsed page header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageHeader {
    pub(super) kind: PageKind,
    pub(super) uncompressed: i32,
    pub(super) compressed: i32,
    pub(super) crc: Option<u32>,
    /// Number of bytes of the header itself.
    pub(super) length: usize,
}

/// Describes why parsing a header failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HeaderFault {
    /// The bytes end inside the header.
    CutOff,
    /// The bytes are not a valid header. The text describes the fault.
    Damaged(&'static str),
}

impl HeaderFault {
    /// Description of the fault, for messages.
    pub(super) const fn text(self) -> &'static str {
        match self {
            Self::CutOff => "it is cut off",
            Self::Damaged(what) => what,
        }
    }
}

pub(super) type Parse<T> = Result<T, HeaderFault>;

// Wire types of the compact protocol.
const TRUE: u8 = 1;
const FALSE: u8 = 2;
const STRUCT: u8 = 12;

/// Limit of nesting. Real headers stay far below it.
const MAX_DEPTH: u32 = 16;

/// Reads values of the compact protocol.
pub(super) struct CompactReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> CompactReader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Number of bytes read so far.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// The bytes read since `start`.
    pub(super) fn since(&self, start: usize) -> &'a [u8] {
        &self.bytes[start..self.at]
    }

    /// The head of a list: the type and the number of its elements.
    pub(super) fn list_head(&mut self) -> Parse<(u8, u64)> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
        Ok((head & 0x0f, count))
    }

    fn byte(&mut self) -> Parse<u8> {
        let byte = *self.bytes.get(self.at).ok_or(HeaderFault::CutOff)?;
        self.at += 1;
        Ok(byte)
    }

    fn varint(&mut self) -> Parse<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(HeaderFault::Damaged("overlong integer"))
    }

    pub(super) fn i32(&mut self) -> Parse<i32> {
        let raw = self.varint()?;
        let value = (raw >> 1) as i64 ^ -((raw & 1) as i64);
        i32::try_from(value).map_err(|_| HeaderFault::Damaged("integer out of range"))
    }

    fn pass(&mut self, bytes: u64) -> Parse<()> {
        let left = (self.bytes.len() - self.at) as u64;
        if bytes > left {
            return Err(HeaderFault::CutOff);
        }
        self.at += bytes as usize;
        Ok(())
    }

    /// Next field of a struct as (id, wire type), or `None` at the end of the struct.
    pub(super) fn field(&mut self, last: &mut i32) -> Parse<Option<(i32, u8)>> {
        let byte = self.byte()?;
        let wire = byte & 0x0f;
        if wire == 0 {
            return Ok(None);
        }
        *last = match byte >> 4 {
            0 => self.i32()?,
            delta => last.checked_add(i32::from(delta)).ok_or(HeaderFault::Damaged("field id out of range"))?,
        };
        Ok(Some((*last, wire)))
    }

    pub(super) fn skip(&mut self, wire: u8, depth: u32) -> Parse<()> {
        if depth > MAX_DEPTH {
            return Err(HeaderFault::Damaged("nested too deeply"));
        }
        match wire {
            TRUE | FALSE => Ok(()),
            3 => self.pass(1),
            4..=6 => self.varint().map(drop),
            7 => self.pass(8),
            8 => {
                let length = self.varint()?;
                self.pass(length)
            }
            9 | 10 => {
                let (wire, count) = self.list_head()?;
                for _ in 0..count {
                    self.skip_element(wire, depth)?;
                }
                Ok(())
            }
            11 => {
                let count = self.varint()?;
                if count > 0 {
                    let types = self.byte()?;
                    for _ in 0..count {
                        self.skip_element(types >> 4, depth)?;
                        self.skip_element(types & 0x0f, depth)?;
                    }
                }
                Ok(())
            }
            STRUCT => {
                let mut last = 0;
                while let Some((_, wire)) = self.field(&mut last)? {
                    self.skip(wire, depth + 1)?;
                }
                Ok(())
            }
            _ => Err(HeaderFault::Damaged("unknown wire type")),
        }
    }

    /// Skips an element of a container. A boolean takes a byte of its own there. Every element thus
    /// takes at least one byte, so the slice bounds the loops above.
    fn skip_element(&mut self, wire: u8, depth: u32) -> Parse<()> {
        if matches!(wire, TRUE | FALSE) { self.pass(1) } else { self.skip(wire, depth + 1) }
    }

    /// Reads a struct and passes its integer and boolean fields to `take`. Skips all other fields.
    fn structure(&mut self, mut take: impl FnMut(i32, i32)) -> Parse<()> {
        let mut last = 0;
        while let Some((id, wire)) = self.field(&mut last)? {
            match wire {
                TRUE => take(id, 1),
                FALSE => take(id, 0),
                4 | 5 => take(id, self.i32()?),
                _ => self.skip(wire, 0)?,
            }
        }
        Ok(())
    }
}

/// Parses the page header at the start of `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Parse<PageHeader> {
    let mut cursor = CompactReader::new(bytes);
    let mut last = 0;
    let (mut kind, mut uncompressed, mut compressed, mut crc) = (None, None, None, None);
    let (mut data, mut data2, mut dictionary) = (None, None, None);
    while let Some((id, wire)) = cursor.field(&mut last)? {
        match (id, wire) {
            (1, 5) => kind = Some(cursor.i32()?),
            (2, 5) => uncompressed = Some(cursor.i32()?),
            (3, 5) => compressed = Some(cursor.i32()?),
            (4, 5) => crc = Some(cursor.i32()? as u32),
            (5, STRUCT) => {
                let mut header = DataHeader { num_values: -1, encoding: -1, ..DataHeader::default() };
                cursor.structure(|id, value| match id {
                    1 => header.num_values = value,
                    2 => header.encoding = value,
                    3 => header.def_encoding = value,
                    4 => header.rep_encoding = value,
                    _ => {}
                })?;
                data = Some(header);
            }
            (7, STRUCT) => {
                let (mut num_values, mut encoding) = (-1, -1);
                cursor.structure(|id, value| match id {
                    1 => num_values = value,
                    2 => encoding = value,
                    _ => {}
                })?;
                dictionary = Some(PageKind::Dictionary { num_values, encoding });
            }
            (8, STRUCT) => {
                let mut header = DataHeader {
                    num_values: -1,
                    encoding: -1,
                    def_encoding: code::RLE,
                    rep_encoding: code::RLE,
                    v2: None,
                };
                let mut v2 = HeaderV2 { compressed: true, ..HeaderV2::default() };
                cursor.structure(|id, value| match id {
                    1 => header.num_values = value,
                    4 => header.encoding = value,
                    5 => v2.def_bytes = value,
                    6 => v2.rep_bytes = value,
                    7 => v2.compressed = value != 0,
                    _ => {}
                })?;
                header.v2 = Some(v2);
                data2 = Some(header);
            }
            _ => cursor.skip(wire, 0)?,
        }
    }
    let missing = HeaderFault::Damaged("a required field is missing");
    let kind = match kind.ok_or(missing)? {
        0 => PageKind::Data(data.ok_or(missing)?),
        2 => dictionary.ok_or(missing)?,
        3 => PageKind::Data(data2.ok_or(missing)?),
        _ => PageKind::Other,
    };
    let header = PageHeader {
        kind,
        uncompressed: uncompressed.ok_or(missing)?,
        compressed: compressed.ok_or(missing)?,
        crc,
        length: cursor.at,
    };
    let negative = match header.kind {
        PageKind::Data(data) => data.num_values < 0 || data.v2.is_some_and(|v2| v2.rep_bytes < 0 || v2.def_bytes < 0),
        PageKind::Dictionary { num_values, .. } => num_values < 0,
        PageKind::Other => false,
    };
    if negative || header.uncompressed < 0 || header.compressed < 0 {
        return Err(HeaderFault::Damaged("a size is negative"));
    }
    Ok(header)
}
