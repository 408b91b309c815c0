//! Fill: writes runs of tokens and of fields into rows, widened to the delivered type.

mod fields;
mod kernels;
mod pieces;
mod rows;

pub(crate) use fields::{FieldRow, Places};
pub(crate) use kernels::{Ahead, Id};
pub(crate) use pieces::{Piece, documents_before, pieces};
pub(crate) use rows::{Row, UnfitId};
