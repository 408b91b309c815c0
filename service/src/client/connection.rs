//! A connection to a server, driven by the thread that waits for it.
//!
//! The connection makes no thread. While nobody waits for a message, the window of the stream and
//! the buffers of the socket hold the messages that the server has sent.

use std::fmt;
use std::path::Path;
use std::pin::pin;
use std::time::{Duration, Instant};

use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{FlightData, FlightDescriptor, Ticket};
use forebay::loader::Cancel;
use forebay::settings::environment::Environment;
use forebay::{Error, ErrorKind};
use tokio::runtime::Runtime;
use tonic::Streaming;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::access::{Shows, Token};
use crate::address::Address;
use crate::protocol::description::Answer;
use crate::protocol::failure::{Failed, failed};

/// Time between two looks at a request to stop.
const SLICE: Duration = Duration::from_millis(20);
/// Largest frame of HTTP/2, in bytes. A batch should fit a few of them.
const FRAME: u32 = 1 << 20;
/// Longest time for a connection to be made.
const CONNECT: Duration = Duration::from_secs(5);

/// Why an attempt failed.
#[derive(Debug)]
pub(super) enum Attempt {
    /// The server is not there. Another attempt may succeed.
    Gone(String),
    /// Every attempt would fail.
    Fault(Error),
}

impl From<Error> for Attempt {
    fn from(error: Error) -> Self {
        Self::Fault(error)
    }
}

/// A connection to one server.
pub(super) struct Connection {
    // The client is dropped before the runtime that drives it.
    client: FlightServiceClient<InterceptedService<Channel, Shows>>,
    runtime: Runtime,
    address: Address,
    timeout: Duration,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to `address`. Streams have windows of `window` bytes. A server that does not answer
    /// within `timeout` counts as gone.
    pub(super) fn to(address: &Address, window: u32, timeout: Duration, cancel: &Cancel) -> Result<Self, Attempt> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
            Error::new(ErrorKind::Io, "cannot make the event loop of a connection").with_source(error)
        })?;
        let uri = match address {
            Address::Unix(path) => {
                let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                format!("unix://{}", path.display())
            }
            Address::Tcp { place, tls: false, .. } => format!("http://{place}"),
            Address::Tcp { place, .. } => format!("https://{place}"),
        };
        let refused = |error| Error::config(format!("`{address}` is no address of a service")).with_source(error);
        let mut endpoint = Endpoint::from_shared(uri).map_err(refused)?;
        if let Address::Tcp { tls: true, ca, .. } = address {
            endpoint = endpoint.tls_config(trusted(address, ca.as_deref())?).map_err(refused)?;
        }
        let endpoint = endpoint
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .max_frame_size(Some(FRAME))
            .initial_stream_window_size(window)
            .initial_connection_window_size(window.saturating_add(1 << 16).min(i32::MAX as u32));
        let connecting = block_on(&runtime, endpoint.connect(), timeout.min(CONNECT), cancel)?;
        let channel = match connecting {
            Some(Ok(channel)) => channel,
            Some(Err(error)) => return Err(Attempt::Gone(causes(&error))),
            None => return Err(Attempt::Gone("it does not answer".to_owned())),
        };
        // The own user's socket needs no token.
        let token = if matches!(address, Address::Unix(_)) { None } else { Token::of(&Environment::current())? };
        let client = FlightServiceClient::with_interceptor(channel, Shows(token)).max_decoding_message_size(usize::MAX);
        Ok(Self { client, runtime, address: address.clone(), timeout })
    }

    /// Sets the time after which a server that says nothing counts as gone.
    pub(super) fn wait_for(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    /// Asks for the corpus of `request`.
    pub(super) fn info(&mut self, request: Vec<u8>, cancel: &Cancel) -> Result<Answer, Attempt> {
        // Opening a large corpus takes long, so that only the caller's deadline counts.
        let asked = self.client.get_flight_info(FlightDescriptor::new_cmd(request));
        let answer = block_on(&self.runtime, asked, self.timeout, cancel)?;
        let info = answer.ok_or_else(|| self.silent())?.map_err(|status| self.attempt(&status))?.into_inner();
        Ok(Answer::parse(&info.app_metadata)?)
    }

    /// Asks for the batches of `ticket`. Returns their stream after its first message.
    pub(super) fn get(
        &mut self,
        ticket: Vec<u8>,
        cancel: &Cancel,
    ) -> Result<(Streaming<FlightData>, FlightData), Attempt> {
        let asked = self.client.do_get(Ticket::new(ticket));
        let answer = block_on(&self.runtime, asked, self.timeout, cancel)?;
        let mut stream = answer.ok_or_else(|| self.silent())?.map_err(|status| self.attempt(&status))?.into_inner();
        let first = self.message(&mut stream, cancel)?;
        Ok((stream, first))
    }

    /// Waits for the next message of `stream`.
    pub(super) fn message(&self, stream: &mut Streaming<FlightData>, cancel: &Cancel) -> Result<FlightData, Attempt> {
        let message = block_on(&self.runtime, stream.message(), self.timeout, cancel)?;
        let message = message.ok_or_else(|| self.silent())?.map_err(|status| self.attempt(&status))?;
        message.ok_or_else(|| Attempt::Gone("it ended the stream early".to_owned()))
    }

    fn silent(&self) -> Attempt {
        Attempt::Gone(format!("it does not answer for {} s", self.timeout.as_secs()))
    }

    fn attempt(&self, status: &tonic::Status) -> Attempt {
        match failed(status) {
            Failed::UnknownHandle => Attempt::Gone(UNKNOWN.to_owned()),
            Failed::Gone(reason) => Attempt::Gone(reason),
            Failed::Fault(error) => Attempt::Fault(error),
        }
    }
}

/// The reason of an attempt that failed because the server does not know the corpus yet.
pub(super) const UNKNOWN: &str = "it does not know the corpus yet";

/// Drives `future` on this thread until it is done, or `timeout` has passed. Fails soon after
/// another thread sets `cancel`.
pub(super) fn block_on<T>(
    runtime: &Runtime,
    future: impl Future<Output = T>,
    timeout: Duration,
    cancel: &Cancel,
) -> Result<Option<T>, Error> {
    let deadline = Instant::now() + timeout;
    runtime.block_on(async {
        let mut future = pin!(future);
        loop {
            if let Ok(done) = tokio::time::timeout(SLICE, &mut future).await {
                return Ok(Some(done));
            }
            cancel.check()?;
            if Instant::now() >= deadline {
                return Ok(None);
            }
        }
    })
}

/// What a consumer of `address` trusts: the certificates in the file `ca`.
fn trusted(address: &Address, ca: Option<&Path>) -> Result<ClientTlsConfig, Error> {
    let Some(ca) = ca else {
        return Err(Error::config(format!(
            "`{address}` needs the certificates to trust: add `?ca=FILE` with a file in PEM format"
        )));
    };
    let pem = std::fs::read(ca).map_err(|error| Error::io("cannot read the certificates to trust", error).at(ca))?;
    Ok(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem)).domain_name(address.host()))
}

/// An error and its causes, on one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}
