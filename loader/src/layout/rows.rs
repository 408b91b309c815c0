//! The layout `rows`: documents that are rows already.
//!
//! Every document has exactly the length of a row. Opening checks that. Arithmetic finds every row.

use std::sync::Arc;

use super::{Documents, Extent, Layout, LayoutWindow, Lengths, Segment, Stream, WindowPlan};
use crate::error::{Error, Result};

/// Documents of the length of a row.
#[derive(Debug)]
pub(super) struct Rows {
    stream: Arc<Stream>,
    row_tokens: u64,
}

impl Rows {
    /// Makes the layout of all shards of `stream`. Fails if a document has another length, together
    /// with its special ids.
    pub(super) fn new(stream: Arc<Stream>, row_tokens: u64, lengths: Lengths<'_>) -> Result<Self> {
        let specials = stream.specials().per_document();
        for shard in 0..stream.shards() {
            let lengths = lengths(shard)?;
            if let Some(document) = lengths.iter().position(|length| u64::from(*length) + specials != row_tokens) {
                let (wanted, found) = (row_tokens.saturating_sub(specials), lengths[document]);
                let around = if specials == 0 { "" } else { " beside `bos_id` and `eos_id`" };
                return Err(Error::data(format!(
                    "`layout` = rows needs documents of exactly {wanted} tokens{around}, but non-empty document \
                     {document} of shard {shard} has {found}: set `seq_len` to the length of the documents, or use \
                     `layout` = pad or pack"
                )));
            }
        }
        Ok(Self { stream, row_tokens })
    }

    /// The layout whose table this is: nothing but the length that all documents have.
    pub(super) fn restore(stream: Arc<Stream>, row_tokens: u64, table: &[u64]) -> Option<Self> {
        (table == [row_tokens]).then_some(Self { stream, row_tokens })
    }
}

impl Layout for Rows {
    fn extent(&self, shards: usize) -> Extent {
        let stream_len = self.stream.start_of(shards);
        Extent { stream_len, rows: stream_len / self.row_tokens, tokens: stream_len, tail_tokens: 0 }
    }

    fn locate(&self, _: &Extent, row: u64) -> (LayoutWindow, usize) {
        let stream = row * self.row_tokens..(row + 1) * self.row_tokens;
        (LayoutWindow { number: row, stream, documents: None }, 0)
    }

    fn plan(&self, window: &LayoutWindow, _: &[u32], plan: &mut WindowPlan) {
        let start = window.stream.start;
        let (_, within) = self.stream.locate(start);
        let documents = Documents::One { number: within / self.row_tokens, ends: true };
        plan.push_row(&[Segment { start, len: self.row_tokens, place: 0, documents }]);
    }

    fn table(&self) -> Vec<u64> {
        vec![self.row_tokens]
    }

    fn index_bytes(&self) -> u64 {
        0
    }
}
