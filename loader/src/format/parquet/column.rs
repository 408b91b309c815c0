//! Column: chooses the token column of a schema.
//!
//! Gives the index of its leaf, the shape of its rows and the type of its ids. Fails, with the
//! accepted types, on a column of any other type.

use parquet::basic::{ConvertedType, LogicalType, Repetition, Type as Physical};
use parquet::schema::types::{SchemaDescriptor, Type};

use super::super::{Holds, OpenOptions, choose_column, column_title};
use crate::error::{Error, Result};
use crate::tokens::{Dtype, DtypeKind};

/// The chosen token column.
#[derive(Clone, Debug)]
pub(super) struct Column {
    pub(super) name: String,
    /// Whether this is a further column, and not the token column.
    pub(super) is_field: bool,
    /// Type on disk.
    pub(super) stored: Dtype,
    /// Index among the leaves of the schema.
    pub(super) leaf: usize,
    /// Type of decoded values.
    pub(super) dtype: Dtype,
    /// Whether a row is a list. Otherwise a row is one token.
    pub(super) lists: bool,
    /// Definition level of a token that is not null.
    pub(super) max_def: u32,
    /// Lowest definition level of an entry that is a token, null or not.
    pub(super) list_def: u32,
    /// Largest number of bytes that a row group may take when it is decoded whole.
    pub(super) most_bytes: u64,
}

/// The reason why the chosen column cannot hold tokens. A file without tokens is sound
/// nevertheless.
#[derive(Clone, Debug)]
pub(super) struct Refused {
    pub(super) error: Error,
    /// Whether null is the only value of its type, so that all rows are null.
    pub(super) is_null: bool,
}

impl Column {
    /// Chooses the column that `options` ask for.
    ///
    /// If only the type of its elements is wrong, the result gives the reason, because its lists
    /// may be empty.
    pub(super) fn choose(schema: &SchemaDescriptor, options: &OpenOptions) -> Result<(Self, Option<Refused>)> {
        let is_field = options.is_field;
        let fields = schema.root_schema().get_fields();
        let columns: Vec<(&str, Holds)> = fields.iter().map(|field| (field.name(), holds(field))).collect();
        let name = choose_column(&columns, options)?;
        let unsupported = |what: &str| {
            Error::data(format!(
                "{} is {what}: expected a list of, or plain, {}; set `{}` or rewrite the file",
                column_title(is_field, name),
                Dtype::accepted(is_field),
                if is_field { "fields" } else { "token_column" }
            ))
        };
        let leaf = (0..schema.num_columns())
            .find(|&leaf| schema.get_column_root(leaf).name() == name)
            .ok_or_else(|| unsupported("an empty struct"))?;
        let field = schema.get_column_root(leaf);
        let element = match shape(field) {
            Some(element) => element,
            None => return Err(unsupported(&describe(field))),
        };
        let descriptor = schema.column(leaf);
        let lists = descriptor.max_rep_level() == 1;
        let is_null = !lists && is_null(element);
        let refuse = |what: &str| (Dtype::I32, Some(Refused { error: unsupported(what), is_null }));
        let (stored, refused) = match dtype(element) {
            Ok(stored) if is_field || stored.is_id() => (stored, None),
            Ok(stored) if is_integer(stored) => refuse(&format!("of type {}", stored.name())),
            Ok(_) => refuse(&format!("of type {}", element.get_physical_type().to_string().to_lowercase())),
            Err(what) => refuse(&what),
        };
        // The page decoder narrows only values without a sign.
        let dtype = if matches!(stored, Dtype::I8 | Dtype::I16) { Dtype::I32 } else { stored };
        let max_def = descriptor.max_def_level().unsigned_abs().into();
        // Every optional node above the repeated one, and the repeated one itself, raise the level
        // at which a list has an entry. An optional element below it raises the level once more.
        let list_def = match lists {
            false => 0,
            true if field.is_primitive() => 1,
            true => u32::from(optional(field)) + 1,
        };
        let most_bytes = options.memory_budget;
        Ok((
            Self { name: name.to_owned(), is_field, stored, leaf, dtype, lists, max_def, list_def, most_bytes },
            refused,
        ))
    }

    /// The column of a file that has no tokens.
    pub(super) fn without_tokens(name: &str, is_field: bool) -> Self {
        Self {
            name: name.to_owned(),
            is_field,
            stored: Dtype::I32,
            leaf: 0,
            dtype: Dtype::I32,
            lists: true,
            max_def: 0,
            list_def: 0,
            most_bytes: 0,
        }
    }

    /// Number of bits of a definition level.
    pub(super) const fn def_width(&self) -> u32 {
        u32::BITS - self.max_def.leading_zeros()
    }

    /// Whether the page decoder does not know the physical type, so that arrow-rs decodes it.
    pub(super) const fn is_unfamiliar(&self) -> bool {
        matches!(self.stored, Dtype::Bool | Dtype::F16)
    }

    /// Number of bytes of a value in the physical type.
    pub(super) const fn physical_size(&self) -> usize {
        if self.stored.size() == 8 { 8 } else { 4 }
    }

    /// Whether values of 64 bits are decoded to 32 bits.
    pub(super) const fn is_narrowed(&self) -> bool {
        self.stored.size() == 8 && self.dtype.size() == 4
    }
}

fn optional(node: &Type) -> bool {
    node.get_basic_info().has_repetition() && node.get_basic_info().repetition() == Repetition::OPTIONAL
}

fn repeated(node: &Type) -> bool {
    node.get_basic_info().has_repetition() && node.get_basic_info().repetition() == Repetition::REPEATED
}

fn is_list(node: &Type) -> bool {
    let info = node.get_basic_info();
    info.converted_type() == ConvertedType::LIST || matches!(info.logical_type_ref(), Some(LogicalType::List))
}

/// The element node of `field`. The field must be a number, a repeated number, or a list of numbers
/// in any of its spellings.
fn shape(field: &Type) -> Option<&Type> {
    if field.is_primitive() {
        return Some(field);
    }
    if !is_list(field) || repeated(field) {
        return None;
    }
    let [middle] = field.get_fields() else { return None };
    if !repeated(middle) {
        return None;
    }
    if middle.is_primitive() {
        return Some(middle);
    }
    match middle.get_fields() {
        [element] if element.is_primitive() && !repeated(element) => Some(element),
        _ => None,
    }
}

/// The content of the rows of a column, for the choice among columns.
fn holds(field: &Type) -> Holds {
    match shape(field).map(dtype) {
        Some(Ok(dtype)) if !is_integer(dtype) => Holds::Other,
        Some(Ok(_)) if field.is_primitive() && !repeated(field) => Holds::Numbers,
        Some(Ok(_)) => Holds::Lists,
        _ => Holds::Other,
    }
}

fn is_integer(dtype: Dtype) -> bool {
    matches!(dtype.kind(), DtypeKind::Signed | DtypeKind::Unsigned)
}

/// Whether null is the only value of the type.
fn is_null(element: &Type) -> bool {
    matches!(element.get_basic_info().logical_type_ref(), Some(LogicalType::Unknown))
}

fn describe(field: &Type) -> String {
    if !is_list(field) {
        return "a struct or map".to_owned();
    }
    "a list of lists or structs".to_owned()
}

fn dtype(element: &Type) -> std::result::Result<Dtype, String> {
    let info = element.get_basic_info();
    let physical = element.get_physical_type();
    if let Some(logical) = info.logical_type_ref() {
        return match (physical, logical) {
            (Physical::INT32 | Physical::INT64, LogicalType::Integer(int)) => {
                integer(physical, u32::from(int.bit_width.unsigned_abs()), int.is_signed)
            }
            (Physical::FIXED_LEN_BYTE_ARRAY, LogicalType::Float16) => Ok(Dtype::F16),
            _ => Err(format!("of type {} ({physical})", logical_name(logical)).to_lowercase()),
        };
    }
    match info.converted_type() {
        ConvertedType::NONE => match physical {
            Physical::INT32 => Ok(Dtype::I32),
            Physical::INT64 => Ok(Dtype::I64),
            Physical::FLOAT => Ok(Dtype::F32),
            Physical::DOUBLE => Ok(Dtype::F64),
            Physical::BOOLEAN => Ok(Dtype::Bool),
            other => Err(format!("of type {}", other.to_string().to_lowercase())),
        },
        ConvertedType::UINT_8 => integer(physical, 8, false),
        ConvertedType::UINT_16 => integer(physical, 16, false),
        ConvertedType::UINT_32 => integer(physical, 32, false),
        ConvertedType::UINT_64 => integer(physical, 64, false),
        ConvertedType::INT_8 => integer(physical, 8, true),
        ConvertedType::INT_16 => integer(physical, 16, true),
        ConvertedType::INT_32 => integer(physical, 32, true),
        ConvertedType::INT_64 => integer(physical, 64, true),
        other => Err(format!("of type {other} ({physical})").to_lowercase()),
    }
}

/// The name of a logical type in the format's documentation.
fn logical_name(logical: &LogicalType) -> String {
    match logical {
        LogicalType::Unknown => "null".to_owned(),
        LogicalType::Integer(int) => format!("{}int{}", if int.is_signed { "" } else { "u" }, int.bit_width),
        LogicalType::Decimal(decimal) => format!("decimal({}, {})", decimal.precision, decimal.scale),
        other => {
            // Only the name comes before the first bracket of such a text.
            let text = format!("{other:?}");
            text.split(['(', '{', ' ']).next().unwrap_or_default().to_owned()
        }
    }
}

fn integer(physical: Physical, bits: u32, signed: bool) -> std::result::Result<Dtype, String> {
    match (physical, bits, signed) {
        (Physical::INT32, 8, false) => Ok(Dtype::U8),
        (Physical::INT32, 16, false) => Ok(Dtype::U16),
        (Physical::INT32, 32, false) => Ok(Dtype::U32),
        (Physical::INT32, 8, true) => Ok(Dtype::I8),
        (Physical::INT32, 16, true) => Ok(Dtype::I16),
        (Physical::INT32, 32, true) => Ok(Dtype::I32),
        (Physical::INT64, 64, true) => Ok(Dtype::I64),
        _ => Err(format!("of type {}int{bits}", if signed { "" } else { "u" })),
    }
}
