//! Fill: writes runs of tokens into rows, widened to the delivered type.

mod kernels;
mod pieces;
mod rows;

pub(crate) use kernels::{Ahead, Id};
pub(crate) use pieces::{Piece, pieces};
pub(crate) use rows::{Row, widen};
