//! Schema: the columns that a corpus delivers beside its tokens.
//!
//! A [`SchemaField`] is one per-token column. It has a name, the type in which it is delivered, and
//! values for places without a token of the file. The name decides all of these but the type, by
//! the table in `rules`. A schema without fields is a corpus of tokens alone.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::tokens::{Dtype, DtypeKind};

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
const fn rules(ignore_index: i64) -> [Rule; 5] {
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
            names: &[],
            delivered: Delivered::AsStored,
            special: 0,
            padding: 0,
            side: TokenSide::Input,
            missing: Missing::Refused,
        },
    ]
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

impl SchemaField {
    /// Makes the field `name` of sources that store it in the types `stored`. `None` stands for a
    /// source that lacks it. Labels that are no target get the value `ignore_index`.
    pub fn of(name: &str, ignore_index: i64, stored: &[(&str, Option<Dtype>)]) -> Result<Self> {
        let rule = rule_of(name, ignore_index);
        let mut dtype = None;
        for (source, stored) in stored {
            let place = if source.is_empty() { String::new() } else { format!(" of source `{source}`") };
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
                Error::data(format!("column `{name}`{place} has type {}: expected {kind}", stored.name()))
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
        Ok(Self { name: interned(name), dtype, special, padding, side, missing })
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
