//! Columns: chooses the token column of a file, and tells what the other columns are likely to
//! hold.
//!
//! Takes the names and shapes of a file's columns. Gives the name of the token column, or an error
//! that lists the columns. A name with other common meanings does not suffice to choose a column:
//! `tokens` and `ids` are also counts of tokens and numbers of rows.

use std::fmt;

use super::OpenOptions;
use crate::error::{Error, Result};
use crate::settings::PackedBy;
use crate::text::escaped;

/// Columns that are taken for the tokens if no column is named, in order of preference.
pub const TOKEN_COLUMNS: [&str; 4] = ["input_ids", "tokens", "token_ids", "ids"];

/// The names of [`TOKEN_COLUMNS`] that are also common for columns with one number per row.
const AMBIGUOUS: [&str; 2] = ["tokens", "ids"];

/// Content of the rows of a column, as far as the choice of the token column depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    /// Lists of integers.
    Lists,
    /// One integer per row.
    Numbers,
    /// Any other content.
    Other,
}

/// The column with a shard's tokens, in one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenColumn {
    /// Index in [`TOKEN_COLUMNS`]. `None` means the column that the settings name.
    known: Option<u8>,
    /// Whether a row is one token.
    plain: bool,
}

/// The bit of [`TokenColumn::number`] that means that a row is one token.
const PLAIN: u8 = 0x80;

impl TokenColumn {
    /// Makes the column called `name`. If it is `plain`, each of its rows is one token.
    pub(crate) fn of(name: &str, plain: bool) -> Self {
        Self { known: TOKEN_COLUMNS.iter().position(|known| *known == name).map(|index| index as u8), plain }
    }

    /// The number that represents the column in a saved index.
    pub(crate) fn number(self) -> u8 {
        self.known.map_or(0, |index| index + 1) | if self.plain { PLAIN } else { 0 }
    }

    /// The column with a number that [`TokenColumn::number`] gave.
    pub(crate) fn of_number(number: u8) -> Option<Self> {
        let known = (number & !PLAIN).checked_sub(1);
        let is_known = known.is_none_or(|index| usize::from(index) < TOKEN_COLUMNS.len());
        is_known.then_some(Self { known, plain: number & PLAIN != 0 })
    }

    /// Name of the column in a shard that was opened with `options`.
    pub fn name(self, options: &OpenOptions) -> &str {
        match self.known {
            Some(index) => TOKEN_COLUMNS[usize::from(index)],
            None => options.token_column.as_deref().unwrap_or_default(),
        }
    }

    /// Whether each row is one token, so that the file is one document.
    pub fn is_plain(self) -> bool {
        self.plain
    }

    /// Whether the column may hold something other than tokens, even if it is the only one of its
    /// file.
    pub(crate) fn is_doubtful(self, options: &OpenOptions) -> bool {
        self.plain && options.token_column.is_none() && AMBIGUOUS.contains(&self.name(options))
    }

    /// Name of the column and the shape of its rows, for messages.
    pub(crate) fn describe(self, options: &OpenOptions) -> String {
        let shape = if self.plain { "one token in each row" } else { "a list in each row" };
        format!("`{}`, {shape}", escaped(self.name(options)))
    }
}

/// Marks an error about a file that lacks a column. Has no text of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MissingColumn;

impl fmt::Display for MissingColumn {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}

impl std::error::Error for MissingColumn {}

/// Picks the column that `options` ask for among `columns` of a file.
pub(crate) fn choose_column<'a>(columns: &[(&'a str, Holds)], options: &OpenOptions) -> Result<&'a str> {
    let wanted = options.token_column.as_deref();
    match wanted.filter(|_| options.is_field) {
        Some(name) if !columns.iter().any(|(column, _)| *column == name) => Err(Error::data(format!(
            "column `{}` of `fields` is missing: the file has {}; correct `fields`, or write the column into every file",
            escaped(name),
            names(columns)
        ))
        .with_source(MissingColumn)),
        _ => choose_token_column(columns, wanted),
    }
}

/// The name by which messages call the column that `options` ask for.
pub(crate) fn column_title(is_field: bool, name: &str) -> String {
    let name = escaped(name);
    if is_field { format!("column `{name}`") } else { format!("token column `{name}`") }
}

/// The error about a null list in a further column.
pub(crate) fn null_list(name: &str) -> Error {
    Error::data(format!(
        "column `{}` has a null list: every row needs a list as long as its tokens, if only an empty one",
        escaped(name)
    ))
}

/// The names of `columns`, for messages.
fn names(columns: &[(&str, Holds)]) -> String {
    let names: Vec<String> = columns.iter().map(|(name, _)| format!("`{}`", escaped(name))).collect();
    if names.is_empty() { "no columns".to_owned() } else { names.join(", ") }
}

/// Picks the token column among `columns` of a file.
///
/// If no column is named, takes the first of [`TOKEN_COLUMNS`] that holds lists of integers. If
/// there is none, takes the first that holds one integer per row. In that case, `tokens` and `ids`
/// are taken only if the file has no other column.
fn choose_token_column<'a>(columns: &[(&'a str, Holds)], wanted: Option<&str>) -> Result<&'a str> {
    let known = || TOKEN_COLUMNS.iter().filter_map(|name| columns.iter().find(|(column, _)| column == name));
    let is_doubtful =
        |name: &str, holds: Holds| holds == Holds::Numbers && columns.len() > 1 && AMBIGUOUS.contains(&name);
    let sure = || known().filter(|(name, holds)| !is_doubtful(name, *holds));
    let found = match wanted {
        Some(name) => columns.iter().find(|(column, _)| *column == name),
        None => [Holds::Lists, Holds::Numbers]
            .into_iter()
            .find_map(|wanted| sure().find(|(_, holds)| *holds == wanted))
            .or_else(|| sure().next()),
    };
    if let Some((name, _)) = found.filter(|(name, _)| columns.iter().filter(|(column, _)| column == name).count() > 1) {
        return Err(Error::data(format!(
            "the file has several columns named `{}`: expected one; rename or remove the others",
            escaped(name)
        )));
    }
    if let Some((name, _)) = found {
        return Ok(name);
    }
    let there = names(columns);
    Err(Error::data(match (wanted, known().next()) {
        (Some(name), _) => {
            format!("token column `{}` is missing: the file has {there}; set `token_column`", escaped(name))
        }
        (None, Some((name, _))) => format!(
            "no token column: `{name}` has one number in each row, which may be a count or the number of the row; the \
             file has {there}; set `token_column` to the column of the tokens"
        ),
        (None, None) => format!(
            "no token column: expected one of `{}`, found {there}; name it with `token_column`",
            TOKEN_COLUMNS.join("`, `")
        ),
    }))
}

/// The content of columns that say where documents begin in rows that were packed before.
pub const STARTS_OF_DOCUMENTS: &str = "starts of documents";

/// The meaning of columns that number positions or segments.
pub const PLACES: &str = "ids of positions or segments";

/// Tells by its name what a column beside the tokens is likely to hold for each token.
pub fn looks_like(column: &str) -> Option<&'static str> {
    let name = column.to_lowercase();
    let has = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
    let starts = |by: PackedBy| matches!(by, PackedBy::SeqLengths | PackedBy::SeqStartId);
    let has_starts = PackedBy::CHOICES.iter().any(|(name, by)| starts(*by) && *name == column);
    match () {
        () if has(&["mask"]) => Some("a mask"),
        () if has(&["weight"]) => Some("weights"),
        () if has(&["label", "target"]) => Some("labels"),
        () if has_starts => Some(STARTS_OF_DOCUMENTS),
        () if has(&["position_id", "token_type", "segment_id", "doc_id"]) => Some(PLACES),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_a_column_gives_it_back() {
        let mut numbers = Vec::new();
        for name in TOKEN_COLUMNS.into_iter().chain(["named by the user"]) {
            for plain in [false, true] {
                let column = TokenColumn::of(name, plain);
                assert_eq!(TokenColumn::of_number(column.number()), Some(column));
                numbers.push(column.number());
            }
        }
        assert!((0..=u8::MAX).all(|number| numbers.contains(&number) == TokenColumn::of_number(number).is_some()));
    }

    #[test]
    fn lists_are_preferred_and_numbers_of_a_doubtful_name_are_refused() {
        use Holds::{Lists, Numbers, Other};
        for (columns, found) in [
            (vec![("tokens", Numbers), ("token_ids", Lists)], Some("token_ids")),
            (vec![("ids", Numbers), ("input_ids", Lists)], Some("input_ids")),
            (vec![("input_ids", Other), ("ids", Lists)], Some("ids")),
            (vec![("ids", Lists), ("tokens", Lists)], Some("tokens")),
            (vec![("text", Other), ("input_ids", Numbers)], Some("input_ids")),
            (vec![("ids", Numbers), ("token_ids", Numbers)], Some("token_ids")),
            (vec![("ids", Numbers), ("input_ids", Other)], Some("input_ids")),
            (vec![("ids", Numbers)], Some("ids")),
            (vec![("tokens", Numbers), ("text", Other)], None),
            (vec![("ids", Numbers), ("token_list", Lists)], None),
            (vec![("tokens", Lists), ("tokens", Numbers)], None),
            (vec![("text", Other)], None),
            (vec![], None),
        ] {
            assert_eq!(choose_token_column(&columns, None).ok(), found, "{columns:?}");
            for (name, _) in &columns {
                let is_single = columns.iter().filter(|(other, _)| other == name).count() == 1;
                assert_eq!(choose_token_column(&columns, Some(name)).is_ok(), is_single, "{columns:?} {name}");
            }
        }
    }
}
