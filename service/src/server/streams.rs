//! Streams of batches. Each has a thread that computes its batches and encodes them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arrow_flight::FlightData;
use forebay::loader::WaitPolicy;
use forebay::settings::default_threads;
use forebay::tokens::Dtype;
use forebay::{Config, Error, ErrorKind, Loader, Next, Result};
use tokio::sync::mpsc::Sender;
use tonic::Status;

use super::data_sets::InUse;
use crate::protocol::failure::status;
use crate::protocol::rows;
use crate::protocol::ticket::Ticket;

/// Messages that wait for the connection.
pub(crate) const QUEUE: usize = 2;
/// Worker threads of a stream, unless `num_threads` sets another number.
const THREADS: u64 = 2;
/// Longest time between two looks at a stop.
const SLICE: Duration = Duration::from_millis(100);

/// A stream that has not begun.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) set: InUse,
    pub(crate) ticket: Ticket,
    pub(crate) messages: Sender<Result<FlightData, Status>>,
    /// Whether the server stops. The server sets it, and streams look at it between two batches.
    pub(crate) draining: Arc<AtomicBool>,
    /// Whether the metrics of this process show the stream.
    pub(crate) is_watched: bool,
}

/// The settings of the session that gives the batches of `ticket`.
pub(super) fn config_of(opened: &Config, ids: Dtype, ticket: &Ticket) -> Result<Config> {
    let mut config = opened.clone();
    ticket.apply(&mut config)?;
    config.num_threads.get_or_insert(default_threads().min(THREADS));
    // Ids of other types may not fit int32, which only the consumer may refuse.
    config.input_dtype = if ids == Dtype::U16 { Dtype::I32 } else { Dtype::I64 };
    Ok(config)
}

impl Stream {
    /// Starts a thread that sends all batches. It ends when the consumer goes away.
    pub(crate) fn start(self) -> std::io::Result<()> {
        std::thread::Builder::new().name("forebay-stream".to_owned()).spawn(move || {
            if let Err(error) = self.send_all() {
                // A consumer that went away needs no error.
                let _ = self.messages.blocking_send(Err(status(&error)));
            }
        })?;
        Ok(())
    }

    fn send_all(&self) -> Result<()> {
        let set = &self.set.0;
        let config = config_of(set.opened.config(), set.ids, &self.ticket)?;
        let ignore_index = config.ignore_index;
        let loader = Arc::new(Loader::new(&set.opened, config)?);
        if self.is_watched {
            crate::metrics::watch_stream(&loader, (self.ticket.start.epoch, self.ticket.start.index))?;
        }
        let format = loader.row_format(set.ids);
        let schema = rows::schema(&format);
        if self.messages.blocking_send(Ok(rows::schema_message(&schema))).is_err() {
            return Ok(());
        }
        let parts = self.ticket.start.parts as usize;
        let batches = loader.begin_at(self.ticket.start.clone());
        while !self.messages.is_closed() {
            if self.draining.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Closed, "the service stops"));
            }
            match batches.take(WaitPolicy::Help(SLICE))? {
                Next::Pending => {}
                Next::End => break,
                Next::Batch(batch) => {
                    let message = rows::encode(&batch, parts, &format, &schema, ignore_index)?;
                    drop(batch);
                    if self.messages.blocking_send(Ok(message)).is_err() {
                        break;
                    }
                }
            }
        }
        loader.close();
        Ok(())
    }
}
