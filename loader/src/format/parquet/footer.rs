//! Footer: reduces a file's footer to the fields that reading needs, and notes encrypted columns.
//!
//! Writers have put values of wrong types into fields that no reader of tokens needs, such as the
//! key-value metadata. The parquet crate refuses such a footer as a whole. It also skips the fields
//! that mark a column as encrypted. So this module copies the needed fields alone, and the parquet
//! crate decodes the copy.

use super::header::{CompactReader, HeaderFault, Parse};

/// Wire types of the compact protocol.
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// A reduced footer.
#[derive(Debug, Default)]
pub(super) struct Reduced {
    /// The footer with only the needed fields.
    pub(super) bytes: Vec<u8>,
    /// Row group and index of each column that is encrypted.
    pub(super) encrypted: Vec<(usize, usize)>,
}

/// A field that the copy keeps: its number, and the way to copy its value.
struct Kept(i32, Copied);

/// The way to copy a value.
enum Copied {
    /// The value is copied unchanged.
    Whole,
    /// The value is a struct. The copy keeps these fields.
    Struct(&'static [Kept]),
    /// The value is a list of structs. The copy keeps these fields of each.
    List(&'static [Kept]),
}

use Copied::{List, Struct, Whole};

const FILE: &[Kept] = &[Kept(1, Whole), Kept(2, Whole), Kept(3, Whole), Kept(4, List(ROW_GROUP)), Kept(6, Whole)];
/// Number of the field with the schema.
const SCHEMA: i32 = 2;
const ROW_GROUP: &[Kept] = &[Kept(1, List(CHUNK)), Kept(2, Whole), Kept(3, Whole)];
const CHUNK: &[Kept] = &[Kept(1, Whole), Kept(2, Whole), Kept(3, Struct(COLUMN))];
/// The fields for type, encodings, path, codec, number of values, sizes, offsets and statistics.
const COLUMN: &[Kept] = &[
    Kept(1, Whole),
    Kept(2, Whole),
    Kept(3, Whole),
    Kept(4, Whole),
    Kept(5, Whole),
    Kept(6, Whole),
    Kept(7, Whole),
    Kept(9, Whole),
    Kept(11, Whole),
    Kept(12, Whole),
];

/// Deepest nesting of a schema. The parquet crate builds and drops schemas by recursion, so that a
/// deeper schema could overflow a thread's stack.
const MAX_NESTING: usize = 128;

/// Fields of a column chunk that mark it as encrypted.
const ENCRYPTED: [i32; 2] = [8, 9];

/// Reduces the footer `bytes`.
pub(super) fn reduce(bytes: &[u8]) -> Parse<Reduced> {
    let mut copy = Copy {
        cursor: CompactReader::new(bytes),
        out: Reduced { bytes: Vec::with_capacity(bytes.len()), encrypted: Vec::new() },
        row_group: 0,
        chunk: 0,
    };
    copy.structure(FILE)?;
    Ok(copy.out)
}

struct Copy<'a> {
    cursor: CompactReader<'a>,
    out: Reduced,
    /// Number of the row group that is copied, and of the column in it.
    row_group: usize,
    chunk: usize,
}

impl Copy<'_> {
    fn structure(&mut self, kept: &'static [Kept]) -> Parse<()> {
        let (mut last, mut last_kept) = (0, 0);
        while let Some((id, wire)) = self.cursor.field(&mut last)? {
            if std::ptr::eq(kept, CHUNK) && ENCRYPTED.contains(&id) {
                self.out.encrypted.push((self.row_group, self.chunk));
            }
            let Some(Kept(_, copied)) = kept.iter().find(|Kept(number, _)| *number == id) else {
                self.cursor.skip(wire, 0)?;
                continue;
            };
            self.head(id, wire, &mut last_kept);
            match (copied, wire) {
                (Struct(fields), STRUCT) => self.structure(fields)?,
                (List(fields), LIST) => self.list(fields)?,
                _ => {
                    let start = self.cursor.at();
                    self.cursor.skip(wire, 0)?;
                    if std::ptr::eq(kept, FILE) && id == SCHEMA {
                        check_schema(self.cursor.since(start))?;
                    }
                    self.out.bytes.extend_from_slice(self.cursor.since(start));
                }
            }
        }
        self.out.bytes.push(0);
        Ok(())
    }

    fn list(&mut self, kept: &'static [Kept]) -> Parse<()> {
        let start = self.cursor.at();
        let (wire, count) = self.cursor.list_head()?;
        if wire != STRUCT && count > 0 {
            return Err(HeaderFault::Damaged("a list has elements of another type"));
        }
        self.out.bytes.extend_from_slice(self.cursor.since(start));
        for index in 0..count {
            if std::ptr::eq(kept, ROW_GROUP) {
                self.row_group = index as usize;
            } else {
                self.chunk = index as usize;
            }
            self.structure(kept)?;
        }
        Ok(())
    }

    /// Writes the head of field `id`.
    fn head(&mut self, id: i32, wire: u8, last: &mut i32) {
        match id - std::mem::replace(last, id) {
            delta @ 1..=15 => self.out.bytes.push((delta as u8) << 4 | wire),
            _ => {
                self.out.bytes.push(wire);
                let mut zigzag = (id as u32) << 1 ^ (id >> 31) as u32;
                while zigzag >= 0x80 {
                    self.out.bytes.push(zigzag as u8 | 0x80);
                    zigzag >>= 7;
                }
                self.out.bytes.push(zigzag as u8);
            }
        }
    }
}

/// Checks that the schema `bytes` is not nested too deeply, and that no group claims more columns
/// than follow. The parquet crate reserves memory for as many columns as a group claims.
fn check_schema(bytes: &[u8]) -> Parse<()> {
    let mut cursor = CompactReader::new(bytes);
    let (wire, count) = cursor.list_head()?;
    if wire != STRUCT && count > 0 {
        return Err(HeaderFault::Damaged("the schema has elements of another type"));
    }
    // The number of columns that each open group still lacks.
    let mut open: Vec<u64> = Vec::new();
    for index in 0..count {
        let (mut columns, mut last) = (0, 0);
        while let Some((id, wire)) = cursor.field(&mut last)? {
            match (id, wire) {
                (5, 5) => columns = cursor.i32()?,
                _ => cursor.skip(wire, 0)?,
            }
        }
        let columns =
            u64::try_from(columns).map_err(|_| HeaderFault::Damaged("a group has a negative number of columns"))?;
        if columns > count - index - 1 {
            return Err(HeaderFault::Damaged("a group claims more columns than the schema has"));
        }
        while open.pop_if(|left| *left == 0).is_some() {}
        if let Some(left) = open.last_mut() {
            *left -= 1;
        }
        if columns > 0 {
            open.push(columns);
        }
        if open.len() > MAX_NESTING {
            return Err(HeaderFault::Damaged("the schema is nested more than 128 levels deep"));
        }
    }
    Ok(())
}
