//! Read: writes the segments of a row into the row, and supplies what layouts ask for.

mod block_cache;
mod borders;
mod eviction;
mod lengths;
mod reader;
#[cfg(test)]
mod tests;

pub(crate) use block_cache::{BlockCache, NeededBy, Prepared};
pub(crate) use eviction::{EvictionPolicy, SessionId};
pub use reader::BlockPlace;
pub(crate) use reader::{DocumentRef, KEPT_PLANS, Padding, ReadMemory, Reader, RowRequest, StreamLocation};
