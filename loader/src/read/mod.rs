//! Read: any stretch of the stream, written into a row.

mod block_cache;
mod reader;

pub(crate) use block_cache::{BlockCache, Prepared};
pub use reader::BlockPlace;
pub(crate) use reader::{Reader, Scratch, StreamLocation};
