//! Reads the columns beside the tokens for `forebay check`, and counts the tokens that are targets.
//!
//! Labels, masks and weights are found by their names, whether `fields` names them or not. Every
//! column of `fields` is read whole, so that its faults are found.

use forebay::format::documents::DocumentColumn;
use forebay::format::{self, DecodedBlock, Ends, EndsScratch, OpenOptions, Shard};
use forebay::tokens::{DtypeKind, Tokens, masked_token};
use forebay::{Config, Error, Result};
use serde_json::{Value, json};

use crate::check::row_of;
use crate::report::{grouped, number_of};

/// The columns that tell which tokens are targets.
const TELLING: [&str; 6] = ["labels", "loss_mask", "completion_mask", "assistant_masks", "weights", "loss_weights"];
/// Number of values read at once if the file holds them as they are.
const PIECE_VALUES: u64 = 1 << 20;

/// The targets among the tokens, by one column.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Supervised {
    pub(crate) column: String,
    tokens: u64,
    targets: u64,
    documents: u64,
    /// Number of documents that have tokens but no target.
    without_target: u64,
}

impl Supervised {
    /// The counts of all shards, for each column in order of its name.
    pub(crate) fn sums(all: impl IntoIterator<Item = Self>) -> Vec<Self> {
        let mut sums: Vec<Self> = Vec::new();
        for one in all {
            let place = sums.iter().position(|sum| sum.column == one.column);
            let index = place.unwrap_or_else(|| {
                sums.push(Self { column: one.column.clone(), ..Self::default() });
                sums.len() - 1
            });
            let sum = &mut sums[index];
            sum.tokens += one.tokens;
            sum.targets += one.targets;
            sum.documents += one.documents;
            sum.without_target += one.without_target;
        }
        sums.sort_unstable_by(|a, b| a.column.cmp(&b.column));
        sums
    }

    /// The counts as text.
    pub(crate) fn text(&self) -> String {
        let share = 100.0 * self.targets as f64 / self.tokens.max(1) as f64;
        format!(
            "{share:.1} % of the tokens are targets by `{}`; {} of {} have none",
            self.column,
            grouped(self.without_target),
            number_of(self.documents, "document")
        )
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "column": self.column,
            "tokens": self.tokens,
            "targets": self.targets,
            "documents": self.documents,
            "without_target": self.without_target,
        })
    }
}

/// The columns of `shard` that are read: those of `fields`, and those that tell targets.
pub(crate) fn columns(shard: &Shard, options: &OpenOptions) -> Vec<String> {
    let mut names = options.fields.clone();
    let not_read = &shard.info().not_read;
    names.extend(TELLING.map(str::to_owned).into_iter().filter(|name| not_read.contains(name)));
    names.sort_unstable();
    names.dedup();
    // The columns of a file without tokens may have any type, or be missing.
    if shard.blocks().is_empty() { Vec::new() } else { names }
}

/// Reads column `name` of the file of `shard`. Returns the counts if it tells targets.
pub(crate) fn read(shard: &Shard, name: &str, options: &OpenOptions, config: &Config) -> Result<Option<Supervised>> {
    let is_named = options.fields.iter().any(|field| field == name);
    let path = shard.path();
    let field = match format::open(path, &options.of_field(name)) {
        Ok(field) if field.info().column.is_plain() == shard.info().column.is_plain() => field,
        // No loader reads the column, so it may hold anything.
        _ if !is_named => return Ok(None),
        Err(error) if error.kind() == forebay::ErrorKind::NotFound => return Err(error),
        found => match DocumentColumn::open(path, name, options) {
            Ok(Some(column)) => return read_documents(&column).map(|()| None),
            _ => return Err(found.err().unwrap_or_else(|| misfit(name, "a list for each row", "numbers").at(path))),
        },
    };
    match compare(shard, &field, name) {
        Err(error) if is_named => return Err(error.at(path)),
        Err(_) => return Ok(None),
        Ok(()) => {}
    }
    let mut before = 0;
    let mut counts = Counts { is_label: name == "labels", ignore_index: config.ignore_index, ..Counts::default() };
    let (mut bytes, mut ends, mut decoded) = (Vec::new(), EndsScratch::default(), DecodedBlock::default());
    // The row of a value needs the lengths of all rows, so that only a fault looks it up.
    let fit = |values: &Tokens<'_>, before: u64| match unfit(name, values, config).filter(|_| is_named) {
        None => Ok(()),
        Some((at, error)) => {
            let row = row_of(&field.row_lengths()?, before + at as u64);
            Err(row.map_or(error.clone(), |row| error.at_row(row)))
        }
    };
    for (block, meta) in field.blocks().iter().enumerate() {
        let read = match &field {
            Shard::Random(shard) => shard.ends(block, &mut ends).and_then(|ends| {
                for start in (0..meta.tokens).step_by(PIECE_VALUES as usize) {
                    let values = shard.tokens(block, start..meta.tokens.min(start + PIECE_VALUES), &mut bytes)?;
                    fit(&values, before + start)?;
                    counts.add(&values, start, &ends);
                }
                Ok(())
            }),
            Shard::Block(shard) => shard.decode_into(block, None, &mut decoded).and_then(|()| {
                let values = Tokens::new(shard.block_dtype(), &decoded.bytes);
                fit(&values, before)?;
                counts.add(&values, 0, &decoded.document_ends());
                Ok(())
            }),
        };
        match read {
            // No loader reads the column, so it may hold nulls.
            Err(_) if !is_named => return Ok(None),
            read => read.map_err(|error| error.at(path).in_block(block as u64))?,
        }
        counts.next_end = 0;
        before += meta.tokens;
    }
    counts.all.column = name.to_owned();
    Ok(TELLING.contains(&name).then_some(counts.all))
}

/// The first value of column `name` that no loader or no model takes: a 0 of an attention mask, or
/// a label outside of the vocabulary.
fn unfit(name: &str, values: &Tokens<'_>, config: &Config) -> Option<(usize, Error)> {
    if values.dtype().kind() == DtypeKind::Float {
        // The type is refused.
        return None;
    }
    let all = || (0..values.len()).map(|index| (index, values.get(index)));
    match (name, config.vocab_size) {
        ("attention_mask", _) => {
            all().find(|(_, value)| *value != 1).map(|(index, value)| (index, masked_token(value)))
        }
        ("labels", Some(vocab_size)) => {
            let is_label = |value: i64| u64::try_from(value).is_ok_and(|id| id < vocab_size);
            let found = all().find(|(_, value)| *value != config.ignore_index && !is_label(*value));
            found.map(|(index, value)| (index, label_outside(value, vocab_size, config.ignore_index)))
        }
        _ => None,
    }
}

fn label_outside(value: i64, vocab_size: u64, ignore_index: i64) -> Error {
    Error::data(format!(
        "label {value} is outside of the vocabulary: expected an id below `vocab_size` = {vocab_size}, or `ignore_index` = \
         {ignore_index}"
    ))
}

fn read_documents(column: &DocumentColumn) -> Result<()> {
    let (mut block, mut row) = (DecodedBlock::default(), 0);
    while row < column.rows() {
        let (part, _) = column.locate(row);
        column.decode_into(part, &mut block)?;
        row = column.part_end(part);
    }
    Ok(())
}

fn misfit(name: &str, expected: &str, found: &str) -> Error {
    Error::data(format!("column `{name}` does not fit the tokens: expected {expected}, found {found}"))
}

/// Fails at the first row in which the column has another length than the tokens.
fn compare(shard: &Shard, field: &Shard, name: &str) -> Result<()> {
    let (tokens, values) = (shard.row_lengths()?, field.row_lengths()?);
    let length = |lengths: &[Option<u64>], row: usize| lengths.get(row).copied().flatten().unwrap_or(0);
    match (0..tokens.len().max(values.len())).find(|row| length(&tokens, *row) != length(&values, *row)) {
        Some(row) => Err(Error::data(format!(
            "column `{name}` must have a value for each token: expected {}, found {}",
            length(&tokens, row),
            length(&values, row)
        ))
        .at_row(row as u64)),
        None => Ok(()),
    }
}

/// Counts while values are read from front to back.
#[derive(Debug, Default)]
struct Counts {
    all: Supervised,
    is_label: bool,
    ignore_index: i64,
    /// Whether the document that is being read has a target.
    has_target: bool,
    /// The first document of the block that has not ended yet.
    next_end: usize,
}

impl Counts {
    /// Adds `values`, which begin `start` values after the start of their block.
    fn add(&mut self, values: &Tokens<'_>, start: u64, ends: &Ends<'_>) {
        let mut at = 0;
        while at < values.len() {
            let ends_here = (self.next_end < ends.len()).then(|| (ends.get(self.next_end) - start) as usize);
            let end = ends_here.map_or(values.len(), |end| end.min(values.len()));
            let targets = (at..end).filter(|index| self.is_target(values, *index)).count() as u64;
            self.all.tokens += (end - at) as u64;
            self.all.targets += targets;
            self.has_target |= targets > 0;
            if ends_here == Some(end) {
                self.all.documents += 1;
                self.all.without_target += u64::from(!self.has_target);
                self.has_target = false;
                self.next_end += 1;
            }
            at = end;
        }
    }

    fn is_target(&self, values: &Tokens<'_>, index: usize) -> bool {
        let value = values.get(index);
        if self.is_label {
            return value != self.ignore_index;
        }
        match values.dtype().kind() {
            // The bit of the sign makes no target of a zero.
            DtypeKind::Float => value << (64 - 8 * values.dtype().size()) << 1 != 0,
            _ => value != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use forebay::tokens::Dtype;

    use super::*;

    #[test]
    fn zeros_are_no_targets_whatever_their_sign() {
        let counts = Counts::default();
        let is_target = |dtype: Dtype, bytes: &[u8]| counts.is_target(&Tokens::new(dtype, bytes), 0);
        assert!(!is_target(Dtype::F32, &(-0.0_f32).to_le_bytes()));
        assert!(is_target(Dtype::F32, &(-0.5_f32).to_le_bytes()));
        assert!(!is_target(Dtype::F64, &(-0.0_f64).to_le_bytes()));
        assert!(is_target(Dtype::F64, &1.0_f64.to_le_bytes()));
        assert!(!is_target(Dtype::F16, &[0, 0x80]) && is_target(Dtype::F16, &[0, 0x3c]));
        assert!(is_target(Dtype::I64, &i64::MIN.to_le_bytes()));
    }
}
