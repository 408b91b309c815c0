//! Fill: writes runs of tokens and of fields into rows, widened to the delivered type.

mod fields;
mod kernels;
mod stream_items;
mod token_row;

pub(crate) use fields::{FieldRow, Places};
pub(crate) use kernels::{Ahead, Id};
pub(crate) use stream_items::{StreamItem, documents_before, stream_items};
pub(crate) use token_row::{TokenRow, UnfitId};
