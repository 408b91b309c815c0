//! Schema: the columns that a corpus delivers beside its tokens.
//!
//! A [`SchemaField`] is one per-token column. It has a name, the type in which it is delivered, and
//! values for places without a token of the file. The name decides all of these but the type, by
//! the table in `rules`. A [`DocumentField`] is one per-document column. A schema without fields is
//! a corpus of tokens alone.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::tokens::{DocumentType, Dtype, DtypeKind, FieldType};

/// The token that a value belongs to if targets are one token ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenSide {
    /// The input at the value's place.
    Input,
    /// The target at the value's place.
    Target,
}

/// The replacement of a column that one source of a mixture lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// Labels made from the tokens.
    Derived,
    /// This number, for every token of a file.
    Value(i64),
    /// No replacement: the source is refused.
    Refused,
}

/// Type of a delivered field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivered {
    /// The type on disk. A type that few libraries have becomes the next larger one.
    AsStored,
    /// A fixed type. Every stored type of the same kind widens to it.
    Always(Dtype),
}

/// The facts about a field that follow from its name.
#[derive(Clone, Copy, Debug)]
struct Rule {
    names: &'static [&'static str],
    delivered: Delivered,
    special: i64,
    padding: i64,
    side: TokenSide,
    missing: Missing,
}

/// The rules by name. The last rule is for all other names.
const fn rules(ignore_index: i64) -> [Rule; 6] {
    [
        Rule {
            names: &["labels"],
            delivered: Delivered::Always(Dtype::I64),
            special: ignore_index,
            padding: ignore_index,
            side: TokenSide::Target,
            missing: Missing::Derived,
        },
        Rule {
            names: &["loss_mask", "completion_mask", "assistant_masks"],
            delivered: Delivered::AsStored,
            special: 0,
            padding: 0,
            side: TokenSide::Target,
            missing: Missing::Value(1),
        },
        Rule {
            names: &["weights", "loss_weights"],
            delivered: Delivered::Always(Dtype::F32),
            special: 0,
            padding: 0,
            side: TokenSide::Target,
            missing: Missing::Value(1),
        },
        Rule {
            names: &["attention_mask"],
            delivered: Delivered::Always(Dtype::I64),
            special: 1,
            padding: 0,
            side: TokenSide::Input,
            missing: Missing::Value(1),
        },
        Rule {
            names: &["position_ids"],
            delivered: Delivered::Always(Dtype::I64),
            // The settings refuse special ids beside this column.
            special: 0,
            padding: 0,
            side: TokenSide::Input,
            missing: Missing::Refused,
        },
        Rule {
            names: &[],
            delivered: Delivered::AsStored,
            special: 0,
            padding: 0,
            side: TokenSide::Input,
            missing: Missing::Refused,
        },
    ]
}

/// The fields of a corpus.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schema {
    /// Columns with one value for each token.
    pub fields: Vec<SchemaField>,
    /// Columns with one value for each document.
    pub documents: Vec<DocumentField>,
}

/// A column with one value for each document. A batch has one value for each stretch of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DocumentField {
    /// Name of the column, and of its values in a batch.
    pub name: &'static str,
    /// Name of the array that tells which values are null. Strings have none.
    pub null_name: &'static str,
    /// Type of the values on disk.
    pub stored: DocumentType,
    /// Type of the values in a batch.
    pub kind: DocumentType,
    /// Place of the column among the further columns.
    pub column: usize,
}

fn rule_of(name: &str, ignore_index: i64) -> Rule {
    let rules = rules(ignore_index);
    *rules.iter().find(|rule| rule.names.contains(&name)).unwrap_or(&rules[rules.len() - 1])
}

/// Whether the column `name` only tells which tokens are targets or padding.
pub fn is_label_or_mask(name: &str) -> bool {
    let masks = ["labels", "loss_mask", "completion_mask", "assistant_masks", "attention_mask"];
    masks.contains(&name)
}

/// A per-token column that is delivered beside the tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchemaField {
    /// Name of the column, and of its array in a batch.
    pub name: &'static str,
    /// Place of the column among the further columns.
    pub column: usize,
    /// Type of its array in a batch.
    pub dtype: Dtype,
    /// Value at `bos_id` and `eos_id`.
    pub special: i64,
    /// Value where a row holds no token.
    pub padding: i64,
    /// The token that a value belongs to if targets are shifted.
    pub side: TokenSide,
    /// Replacement of the column in a source that lacks it.
    pub missing: Missing,
}

impl Schema {
    /// Makes the schema of the further columns `names`. `stored` gives the types of a column in all
    /// sources, each with the name of the source. `None` stands for a source that lacks it. Labels
    /// that are no target get the value `ignore_index`.
    pub fn of<'a>(
        names: &[String],
        ignore_index: i64,
        stored: impl Fn(usize) -> Vec<(&'a str, Option<FieldType>)>,
    ) -> Result<Self> {
        let mut schema = Self::default();
        for (column, name) in names.iter().enumerate() {
            let stored = stored(column);
            let is_per_document =
                |(_, found): &(_, Option<FieldType>)| matches!(found, Some(FieldType::PerDocument(_)));
            if stored.iter().any(is_per_document) {
                schema.documents.push(DocumentField::of(name, column, &stored)?);
                continue;
            }
            let per_token = |(source, found): (&'a str, Option<FieldType>)| match found {
                Some(FieldType::PerToken(dtype)) => (source, Some(dtype)),
                _ => (source, None),
            };
            let stored: Vec<_> = stored.into_iter().map(per_token).collect();
            schema.fields.push(SchemaField::of(name, column, ignore_index, &stored)?);
        }
        Ok(schema)
    }

    /// Adds the field `name`, which no source has.
    pub(crate) fn add_missing(&mut self, name: &str, ignore_index: i64) -> Result<()> {
        // No corpus has so many columns.
        self.fields.push(SchemaField::of(name, usize::MAX, ignore_index, &[])?);
        Ok(())
    }

    /// Bytes that all per-token fields take for each place of a row.
    pub fn bytes_per_token(&self) -> usize {
        self.fields.iter().map(|field| field.dtype.size()).sum()
    }
}

/// Text that tells a source in a message. A corpus without a mixture has no name.
fn place_of(source: &str) -> String {
    if source.is_empty() { String::new() } else { format!(" of source `{source}`") }
}

impl DocumentField {
    /// Makes further column `column`, called `name`. `stored` gives its types in the sources.
    fn of(name: &str, column: usize, stored: &[(&str, Option<FieldType>)]) -> Result<Self> {
        if !rule_of(name, 0).names.is_empty() {
            let is_per_document = |found: &Option<FieldType>| matches!(found, Some(FieldType::PerDocument(_)));
            let place = stored.iter().find(|(_, found)| is_per_document(found)).map(|(source, _)| place_of(source));
            let place = place.unwrap_or_default();
            return Err(Error::data(format!(
                "column `{name}`{place} has one value in each row: expected a list with a value for each token; rename the column \
                 if its values belong to documents"
            )));
        }
        let mut kind = None;
        for (source, found) in stored {
            let place = place_of(source);
            let found = match found {
                None => return Err(Error::data(format!("column `{name}`{place} is missing: no value stands for it"))),
                Some(FieldType::PerToken(_)) => {
                    return Err(Error::data(format!(
                        "column `{name}`{place} has a value for each token, and for each document elsewhere; rename one of \
                         them"
                    )));
                }
                Some(FieldType::PerDocument(found)) => *found,
            };
            if *kind.get_or_insert(found) != found {
                return Err(Error::data(format!(
                    "types of column `{name}` differ between sources: {}{place}, {} before; rewrite them with one type",
                    found.name(),
                    kind.map_or("none", DocumentType::name)
                )));
            }
        }
        let stored = kind.unwrap_or(DocumentType::Text);
        let kind = match stored {
            DocumentType::Number(Dtype::U16) => DocumentType::Number(Dtype::I32),
            DocumentType::Number(Dtype::U32) => DocumentType::Number(Dtype::I64),
            other => other,
        };
        Ok(Self { name: interned(name), null_name: interned(&format!("{name}_is_null")), stored, kind, column })
    }
}

impl SchemaField {
    /// Makes further column `column`, called `name`. `stored` gives its types in the sources.
    /// `None` stands for a source that lacks it. Labels that are no target get the value
    /// `ignore_index`.
    fn of(name: &str, column: usize, ignore_index: i64, stored: &[(&str, Option<Dtype>)]) -> Result<Self> {
        let rule = rule_of(name, ignore_index);
        let mut dtype = None;
        for (source, stored) in stored {
            let place = place_of(source);
            let Some(stored) = *stored else {
                if rule.missing == Missing::Refused {
                    let masks = "only missing labels, masks and weights have a value that stands for them";
                    return Err(Error::data(format!("column `{name}`{place} is missing: {masks}")));
                }
                continue;
            };
            let delivered = rule.delivered.of(stored).ok_or_else(|| {
                let Delivered::Always(wanted) = rule.delivered else { unreachable!("any stored type will do") };
                let kind =
                    if wanted.kind() == DtypeKind::Float { "float16 or float32" } else { "an integer type or bool" };
                Error::data(format!(
                    "column `{name}`{place} has type {}: expected {kind}; write it with such a type",
                    stored.name()
                ))
            })?;
            if *dtype.get_or_insert(delivered) != delivered {
                return Err(Error::data(format!(
                    "types of column `{name}` differ between sources: {}{place}, {} before; rewrite them with one type",
                    delivered.name(),
                    dtype.map_or("none", Dtype::name)
                )));
            }
        }
        let dtype = match (dtype, rule.delivered) {
            (Some(dtype), _) | (None, Delivered::Always(dtype)) => dtype,
            (None, Delivered::AsStored) => Dtype::U8,
        };
        let Rule { special, padding, side, missing, .. } = rule;
        Ok(Self { name: interned(name), column, dtype, special, padding, side, missing })
    }
}

impl Delivered {
    fn of(self, stored: Dtype) -> Option<Dtype> {
        match self {
            Self::AsStored => Some(match stored {
                Dtype::U16 => Dtype::I32,
                Dtype::U32 => Dtype::I64,
                other => other,
            }),
            Self::Always(dtype) => {
                let is_float = |dtype: Dtype| dtype.kind() == DtypeKind::Float;
                let widens = is_float(stored) == is_float(dtype) && stored.size() < dtype.size();
                (stored == dtype || widens).then_some(dtype)
            }
        }
    }
}

/// Returns the name in memory that lives as long as the process. Few names are ever used, and each
/// is kept once.
fn interned(name: &str) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.get(name) {
        return known;
    }
    let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
    names.insert(name);
    name
}
