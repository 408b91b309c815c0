//! NumPy arrays (`.npy`): an array of one dimension is one document. In a matrix, each row is one.
//!
//! A header in Python's notation gives type, order and shape. Versions 1 to 3 of the format differ
//! in the encoding of the header, and in the width of its length. Format: `numpy.lib.format`.

use super::{Contents, FlatDocuments, check_size};
use crate::error::{Error, Result};
use crate::format::{FileSample, Format, OpenOptions, Recognised, Shard};
use crate::storage::Reads;
use crate::text::escaped;
use crate::tokens::Dtype;

const MAGIC: &[u8] = b"\x93NUMPY";
/// NumPy writes headers of some hundred bytes, and refuses to read more than 10,000.
const MAX_HEADER: u64 = 1 << 16;

/// Recognises an array by its first bytes.
pub(in crate::format) fn recognise(sample: &FileSample<'_>) -> Recognised {
    if sample.head.starts_with(MAGIC) { Recognised::Yes } else { Recognised::No }
}

/// Opens the array of `reads`.
pub(in crate::format) fn open(mut reads: Reads, options: &OpenOptions) -> Result<Shard> {
    let (header, start) = header(&mut reads)?;
    let Header { descr, fortran_order, shape } = Header::parse(&header).ok_or_else(|| {
        let shown = escaped(&header).trim_end().to_owned();
        Error::data(format!(
            "the header of the NumPy array is damaged: expected `descr`, `fortran_order` and `shape`, found `{shown}`"
        ))
    })?;
    let dtype = dtype_of(&descr)?;
    let documents = match *shape {
        [_] => FlatDocuments::One,
        [rows, columns] if !fortran_order || rows.min(columns) <= 1 => {
            FlatDocuments::Fixed { length: columns, count: rows }
        }
        [_, _] => {
            return Err(Error::data(
                "the NumPy array is in Fortran order: expected C order, in which a row is a document; save \
                 `numpy.ascontiguousarray(array)`",
            ));
        }
        _ => {
            return Err(Error::data(format!(
                "the NumPy array has {} dimensions: expected one (a document) or two (a document in each row)",
                shape.len()
            )));
        }
    };
    let tokens = shape.iter().try_fold(1u64, |product, length| product.checked_mul(*length)).unwrap_or(u64::MAX);
    check_size(reads.file(), start, dtype, tokens, "the header of the NumPy array says that it has")?;
    let file = reads.into_file();
    Contents { format: Format::Npy, file, start, dtype, tokens, documents, further: None }.open(options)
}

/// The text of the header, and the place just after it.
fn header(reads: &mut Reads) -> Result<(String, u64)> {
    let cut = |what: &str| Error::data(format!("the NumPy array is cut in its {what}: write or copy it again"));
    let len = reads.file().len();
    if len < 12 {
        return Err(cut("first bytes"));
    }
    let first = reads.get(0..12)?;
    let (major, minor) = (first[6], first[7]);
    let (start, length) = match (major, minor) {
        (1, 0) => (10, u64::from(u16::from_le_bytes([first[8], first[9]]))),
        (2 | 3, 0) => (12, u64::from(u32::from_le_bytes([first[8], first[9], first[10], first[11]]))),
        _ => {
            return Err(Error::data(format!(
                "the NumPy array has format version {major}.{minor}: expected 1.0, 2.0 or 3.0"
            )));
        }
    };
    if length > MAX_HEADER {
        return Err(Error::data(format!(
            "the header of the NumPy array claims {length} bytes: expected at most {MAX_HEADER}; the file is damaged"
        )));
    }
    if start + length > len {
        return Err(cut("header"));
    }
    let text = String::from_utf8_lossy(reads.get(start..start + length)?).into_owned();
    Ok((text, start + length))
}

/// The type with the name `descr` in NumPy.
fn dtype_of(descr: &Descr) -> Result<Dtype> {
    let Descr::Name(name) = descr else {
        return Err(Error::data("the NumPy array has records: expected integers; save the field of the ids alone"));
    };
    let (order, name) = match name.as_bytes() {
        [order @ (b'<' | b'>' | b'|' | b'='), ..] => (*order, &name[1..]),
        _ => (b'<', &**name),
    };
    let dtype = match name {
        "u1" => Dtype::U8,
        "u2" => Dtype::U16,
        "u4" => Dtype::U32,
        "i1" => Dtype::I8,
        "i2" => Dtype::I16,
        "i4" => Dtype::I32,
        "i8" => Dtype::I64,
        _ => {
            return Err(Error::data(format!(
                "the NumPy array has type `{}`: expected {}; save `array.astype(\"uint16\")`, or another type that holds \
                 all ids",
                escaped(name),
                Dtype::accepted(false)
            )));
        }
    };
    if order == b'>' && dtype.size() > 1 {
        return Err(Error::data(format!(
            "the NumPy array is big-endian (`>{name}`): expected little-endian; save `array.astype(\"<{name}\")`"
        )));
    }
    Ok(dtype)
}

/// The type of the values, as the header gives it.
#[derive(Debug, PartialEq, Eq)]
enum Descr {
    /// The name of a type.
    Name(String),
    /// A list of fields.
    Records,
}

/// The parts of a header.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    descr: Descr,
    fortran_order: bool,
    shape: Vec<u64>,
}

impl Header {
    /// Reads a dictionary of Python with exactly these three keys.
    fn parse(text: &str) -> Option<Self> {
        let mut rest = Text(text);
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        rest.take("{")?;
        while rest.take("}").is_none() {
            let key = rest.string()?;
            rest.take(":")?;
            match key {
                "descr" if descr.is_none() => descr = Some(rest.descr()?),
                "fortran_order" if fortran_order.is_none() => fortran_order = Some(rest.boolean()?),
                "shape" if shape.is_none() => shape = Some(rest.shape()?),
                _ => return None,
            }
            if rest.take(",").is_none() {
                rest.take("}")?;
                break;
            }
        }
        let header = Self { descr: descr?, fortran_order: fortran_order?, shape: shape? };
        rest.0.trim().is_empty().then_some(header)
    }
}

/// The rest of the text.
struct Text<'a>(&'a str);

impl<'a> Text<'a> {
    /// Skips blanks, and then `word`.
    fn take(&mut self, word: &str) -> Option<()> {
        self.0 = self.0.trim_start().strip_prefix(word)?;
        Some(())
    }

    fn string(&mut self) -> Option<&'a str> {
        let quote = ["'", "\""].into_iter().find(|quote| self.take(quote).is_some())?;
        let (string, rest) = self.0.split_once(quote)?;
        self.0 = rest;
        Some(string)
    }

    fn boolean(&mut self) -> Option<bool> {
        [("True", true), ("False", false)]
            .into_iter()
            .find(|(word, _)| self.take(word).is_some())
            .map(|(_, value)| value)
    }

    fn descr(&mut self) -> Option<Descr> {
        if self.take("[").is_none() {
            return self.string().map(|name| Descr::Name(name.to_owned()));
        }
        let mut depth = 1;
        let end = self.0.find(|c| {
            depth += i32::from(c == '[') - i32::from(c == ']');
            depth == 0
        })?;
        self.0 = &self.0[end + 1..];
        Some(Descr::Records)
    }

    fn shape(&mut self) -> Option<Vec<u64>> {
        let mut lengths = Vec::new();
        self.take("(")?;
        while self.take(")").is_none() {
            self.0 = self.0.trim_start();
            let digits = self.0.find(|c: char| !c.is_ascii_digit())?;
            lengths.push(self.0[..digits].parse().ok()?);
            self.0 = &self.0[digits..];
            // Python 2 marked long integers.
            let _ = self.take("L");
            if self.take(",").is_none() {
                self.take(")")?;
                break;
            }
        }
        Some(lengths)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<(Descr, bool, Vec<u64>)> {
        Header::parse(text).map(|header| (header.descr, header.fortran_order, header.shape))
    }

    #[test]
    fn headers_are_read_in_any_spelling_of_python() {
        let name = |name: &str| Descr::Name(name.to_owned());
        for (text, found) in [
            ("{'descr': '<u2', 'fortran_order': False, 'shape': (10,), }   \n", (name("<u2"), false, vec![10])),
            ("{'shape': (3, 4), 'fortran_order': True, 'descr': '<i8'}", (name("<i8"), true, vec![3, 4])),
            ("{\"descr\":\"|u1\",\"fortran_order\":False,\"shape\":(7L,)}\n", (name("|u1"), false, vec![7])),
            ("{'descr': '<i4', 'fortran_order': False, 'shape': ()}", (name("<i4"), false, vec![])),
            (
                "{'descr': [('a', '<u2'), ('b', '<u2', (2,))], 'fortran_order': False, 'shape': (1,)}",
                (Descr::Records, false, vec![1]),
            ),
        ] {
            assert_eq!(parsed(text), Some(found), "{text}");
        }
    }

    #[test]
    fn damaged_headers_are_no_headers() {
        let sound = "{'descr': '<u2', 'fortran_order': False, 'shape': (10,), }";
        assert!(parsed(sound).is_some());
        for cut in 0..sound.len() {
            assert_eq!(parsed(&sound[..cut]), None, "{cut}");
        }
        for text in [
            "{'descr': '<u2', 'descr': '<u2', 'fortran_order': False, 'shape': (10,)}",
            "{'descr': '<u2', 'fortran_order': False, 'shape': (10,), 'more': 1}",
            "{'descr': '<u2', 'fortran_order': None, 'shape': (10,)}",
            "{'descr': '<u2', 'fortran_order': False, 'shape': (-10,)}",
            "{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999,)}",
            "{'descr': '<u2', 'fortran_order': False, 'shape': (10,)} more",
        ] {
            assert_eq!(parsed(text), None, "{text}");
        }
    }
}
