//! A stream of batches that goes on at another server, or in this process.

use std::sync::Arc;
use std::time::Duration;

use arrow_flight::FlightData;
use arrow_ipc::convert::try_schema_from_flatbuffer_bytes;
use arrow_schema::SchemaRef;
use forebay::loader::Cancel;
use forebay::loader::served::{PassStart, ReceivedRows, RowFormat, RowStream};
use forebay::notices::{self, Level};
use forebay::{Config, Error, ErrorKind, Result};
use tonic::Streaming;

use super::connection::{Attempt, Connection, UNKNOWN};
use super::fallback::LocalStream;
use super::{Patience, Service};
use crate::protocol::rows::{Received, schema};
use crate::protocol::ticket::Ticket;

/// Smallest window of a stream, in bytes: that of HTTP/2 itself.
const LEAST_WINDOW: usize = 64 << 10;
/// Largest window of a stream, in bytes.
const MOST_WINDOW: usize = 1 << 30;

/// Time in which a server shows that it answers again. Meanwhile, no batch is computed.
const GLANCE: Duration = Duration::from_secs(1);

/// The batches of a pass, from any server.
pub(super) struct ServedStream {
    service: Arc<Service>,
    config: Config,
    format: RowFormat,
    schema: SchemaRef,
    /// Where the next batch begins, and the number of batches that are left.
    start: PassStart,
    window: u32,
    live: Option<Live>,
    /// The same batches from this process, while no server answers.
    local: Option<LocalStream>,
    /// Whether the log tells that no server answers.
    is_gone: bool,
}

struct Live {
    // The stream is dropped before the connection that drives it.
    messages: Streaming<FlightData>,
    connection: Connection,
}

impl ServedStream {
    pub(super) fn new(service: Arc<Service>, config: &Config, format: &RowFormat, start: &PassStart) -> Self {
        let of_row = format.row_ids * format.ids.size()
            + format.columns * format.fields.iter().map(|field| field.dtype.size()).sum::<usize>()
            + format.columns / 8;
        let bytes = (config.batch_size.saturating_mul(config.prefetch_batches) as usize).saturating_mul(of_row);
        let window = bytes.clamp(LEAST_WINDOW, MOST_WINDOW) as u32;
        let (config, format, schema) = (config.clone(), format.clone(), schema(format));
        Self { service, config, format, schema, start: start.clone(), window, live: None, local: None, is_gone: false }
    }

    /// Connects to the server whose turn it is, and asks for the batches that are left. A server
    /// that says nothing for `silence` is gone.
    fn connect(&self, patience: &Patience, silence: Duration, cancel: &Cancel) -> Result<Live, Attempt> {
        let address = self.service.address(patience);
        let mut connection = Connection::to(address, self.window, silence, cancel)?;
        let handle = match self.service.handle() {
            Some(handle) => handle,
            None => self.service.ask_over(&mut connection, &[], cancel)?.handle,
        };
        let mut got = connection.get(self.ticket(&handle), cancel);
        if matches!(&got, Err(Attempt::Gone(reason)) if reason == UNKNOWN) {
            let handle = self.service.ask_over(&mut connection, &[], cancel)?.handle;
            got = connection.get(self.ticket(&handle), cancel);
        }
        let (messages, first) = got?;
        let found = try_schema_from_flatbuffer_bytes(&first.data_header)
            .map_err(|error| Error::new(ErrorKind::Data, "the service sent no schema").with_source(error))?;
        if found != *self.schema {
            return Err(Attempt::Fault(Error::new(
                ErrorKind::Data,
                format!("the service at `{address}` sends other columns: {found} there, {} here", self.schema),
            )));
        }
        Ok(Live { messages, connection })
    }

    fn ticket(&self, handle: &str) -> Vec<u8> {
        Ticket::of(handle, &self.config, &self.start).to_bytes()
    }

    /// Connects to a server that answers again, while this process computes the batches.
    fn back(&self, cancel: &Cancel) -> Result<Option<Live>> {
        let mut patience = Patience::new(GLANCE);
        for _ in &self.service.addresses {
            match self.connect(&patience, GLANCE, cancel) {
                Ok(mut live) => {
                    live.connection.wait_for(self.service.silence());
                    return Ok(Some(live));
                }
                Err(Attempt::Fault(error)) => return Err(error),
                Err(Attempt::Gone(_)) => patience.attempts += 1,
            }
        }
        Ok(None)
    }

    /// Tells once that a server is gone. A server that is first asked for its batches may not know
    /// the corpus yet, which is no news.
    fn tell_gone(&mut self, reason: &str, patience: &Patience) {
        if !self.is_gone && reason != UNKNOWN {
            self.is_gone = true;
            let address = self.service.address(patience);
            notices::add(Level::Warning, format!("the service at `{address}` is gone ({reason}): trying to reach one"));
        }
    }

    /// Tells that a server answers again.
    fn tell_back(&mut self) {
        self.is_gone = false;
        notices::add(Level::Warning, "a service answers again, and gives the batches from here on");
    }

    /// The next message, from any server or from this process.
    fn message(&mut self, cancel: &Cancel) -> Result<FlightData> {
        if let Some(mut local) = self.local.take() {
            if local.is_due() {
                self.live = self.back(cancel)?;
                local.tried();
                if self.live.is_some() {
                    self.tell_back();
                }
            }
            if self.live.is_none() {
                let message = local.message(cancel)?;
                self.local = Some(local);
                return Ok(message);
            }
        }
        let service = Arc::clone(&self.service);
        let mut patience = Patience::new(service.timeout);
        loop {
            let live = match self.live.take() {
                Some(live) => Ok(live),
                None => self.connect(&patience, service.silence(), cancel),
            };
            let received = live.and_then(|mut live| {
                let message = live.connection.message(&mut live.messages, cancel)?;
                self.live = Some(live);
                if let Some(fallback) = &service.fallback {
                    fallback.close_unused();
                }
                Ok(message)
            });
            match received {
                Ok(message) => {
                    if self.is_gone {
                        self.tell_back();
                    }
                    return Ok(message);
                }
                Err(Attempt::Fault(error)) => return Err(error),
                Err(Attempt::Gone(reason)) => {
                    self.tell_gone(&reason, &patience);
                    if let Some(fallback) = service.fallback_after(&patience) {
                        let (set, answer) = service.ask_fallback(fallback, &[])?;
                        let ticket = Ticket::of(&answer.handle, &self.config, &self.start);
                        let mut local = LocalStream::begin(&set, ticket, cancel)?;
                        let message = local.message(cancel)?;
                        self.local = Some(local);
                        notices::add(Level::Warning, "this process computes its batches until a service answers again");
                        return Ok(message);
                    }
                    patience.wait(&service, &reason, cancel)?;
                }
            }
        }
    }
}

impl RowStream for ServedStream {
    fn next(&mut self, cancel: &Cancel, take: &mut dyn FnMut(&ReceivedRows<'_>) -> Result<()>) -> Result<()> {
        let message = self.message(cancel)?;
        let received = Received::decode(&message, &self.schema)?;
        received.rows(&self.format, take)?;
        self.start.index += self.config.batch_size * self.config.dp_world_size.unwrap_or(1);
        self.start.batches -= 1;
        Ok(())
    }
}
