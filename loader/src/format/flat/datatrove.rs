//! Files of datatrove: ids in `NAME.ds`, and the ends of documents in `NAME.ds.index`.
//!
//! The size of the ids and the last end tell the type of the ids. `NAME.ds.loss` may hold a mask
//! with one byte per id, which counts as the column `loss_mask`. `NAME.ds.metadata` names the
//! tokenizer, the bytes of an id and the number of ids. Format: `pipeline/tokens/tokenizer.py` of
//! datatrove.

use std::path::{Path, PathBuf};

use super::documents::{DocumentTable, TableKind, entries};
use super::{Contents, FlatDocuments, check_size};
use crate::error::{Error, Result};
use crate::format::{FileSample, Format, OpenOptions, Recognised, Shard};
use crate::storage::{Reads, SourceFile};
use crate::tokens::Dtype;

/// The name under which a mask is read.
const MASK: &str = "loss_mask";
/// Suffixes of the files beside the ids.
const BESIDE: [&str; 3] = [".index", ".loss", ".metadata"];

/// The file beside `path` whose name has the further suffix `suffix`.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Recognises the ids by the index beside them.
pub(in crate::format) fn recognise(sample: &FileSample<'_>) -> Recognised {
    let name = sample.path.to_string_lossy();
    if let Some(ids) = BESIDE.iter().find_map(|suffix| name.strip_suffix(suffix)).filter(|ids| ids.ends_with(".ds")) {
        let text = format!("the file belongs to the ids of datatrove: name these, `{ids}`");
        return Recognised::Refused(Error::data(text));
    }
    if !sample.ends_in("ds") {
        return Recognised::No;
    }
    let index = beside(sample.path, ".index");
    match sample.options.files.has_file(&index) {
        Ok(true) => Recognised::Yes,
        Ok(false) => Recognised::Refused(Error::data(format!(
            "a file of datatrove needs the index of its documents: expected `{}` beside it; write it with \
             `save_index=True`, or give the file the suffix `.bin` and set `bin_dtype`",
            index.display()
        ))),
        Err(error) => Recognised::Refused(error.at(&index)),
    }
}

/// Opens the ids of `reads`, or the mask beside them if `options` ask for that column.
pub(in crate::format) fn open(reads: Reads, options: &OpenOptions) -> Result<Shard> {
    let file = reads.into_file();
    let path = beside(file.path(), ".index");
    let index = options.files.open(&path, options.io)?;
    let (documents, tokens) = counts(&index).map_err(|error| error.at(&path))?;
    let dtype = dtype_of(&file, tokens)?;
    check_metadata(&file, dtype, tokens, options)?;
    let documents = FlatDocuments::Listed(DocumentTable { index, documents, kind: TableKind::Ends });
    let mask = beside(file.path(), ".loss");
    let further = options.files.has_file(&mask)?.then_some(MASK);
    let contents = Contents { format: Format::Datatrove, file, start: 0, dtype, tokens, documents, further };
    if options.is_field && further.is_some() && options.token_column.as_deref() == Some(MASK) {
        let file = options.files.open(&mask, options.io)?;
        let says = "the index says that the mask has";
        check_size(&file, 0, Dtype::Bool, tokens, says).map_err(|error| error.at(&mask))?;
        return Contents { file, dtype: Dtype::Bool, ..contents }.open(options);
    }
    contents.open(options)
}

/// The numbers of documents and of ids, by the index.
fn counts(index: &SourceFile) -> Result<(u64, u64)> {
    if !index.len().is_multiple_of(8) {
        return Err(Error::data(format!(
            "the index of the documents is damaged: expected a multiple of 8 bytes, found {}; write or copy it again",
            index.len()
        )));
    }
    let mut scratch = Vec::new();
    let last = index.len().saturating_sub(8)..index.len();
    let tokens = entries(index.slice(last, &mut scratch)?).next().unwrap_or(0);
    Ok((index.len() / 8, tokens))
}

/// The type of `tokens` ids in `file`, by its size.
fn dtype_of(file: &SourceFile, tokens: u64) -> Result<Dtype> {
    let fits = |dtype: &Dtype| tokens.checked_mul(dtype.size() as u64) == Some(file.len());
    [Dtype::U16, Dtype::U32].into_iter().find(fits).ok_or_else(|| {
        let bytes = |width: u64| tokens.checked_mul(width).map_or_else(|| "more".to_owned(), |bytes| bytes.to_string());
        Error::data(format!(
            "the file does not fit its index, which ends after {tokens} ids: expected {} bytes (uint16) or {} (uint32), \
             found {}; the file is cut, or the index belongs to another",
            bytes(2),
            bytes(4),
            file.len()
        ))
    })
}

/// Fails if there are metadata that contradict the ids.
fn check_metadata(file: &SourceFile, dtype: Dtype, tokens: u64, options: &OpenOptions) -> Result<()> {
    let path = beside(file.path(), ".metadata");
    let Some(text) = options.files.read_if_there(&path)? else { return Ok(()) };
    let text = String::from_utf8_lossy(&text);
    let mut lines = text.lines();
    let width = lines.next().and_then(|line| line.rsplit_once('|')?.1.trim().parse::<u64>().ok());
    let count = lines.next().and_then(|line| line.trim().parse::<u64>().ok());
    let differs = |what: &str, found: u64, expected: u64| {
        let text = format!("the metadata do not fit the ids: {what} is {found}, expected {expected}; write them again");
        Err(Error::data(text).at(&path))
    };
    match (width, count) {
        (Some(width), _) if tokens > 0 && width != dtype.size() as u64 => {
            differs("the number of bytes of an id", width, dtype.size() as u64)
        }
        (_, Some(count)) if count != tokens => differs("the number of ids", count, tokens),
        _ => Ok(()),
    }
}
