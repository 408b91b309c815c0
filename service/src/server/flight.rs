//! The calls of Arrow Flight.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow_flight::flight_service_server::FlightService;
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightEndpoint, FlightInfo, HandshakeRequest,
    HandshakeResponse, PollInfo, PutResult, SchemaAsIpc, SchemaResult,
};
use arrow_ipc::writer::IpcWriteOptions;
use forebay::loader::served::PassStart;
use forebay::{Config, Error, ErrorKind, Loader, Result};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::data_sets::{DataSet, DataSets, InUse};
use super::streams::{QUEUE, Stream, config_of};
use crate::protocol::description::Answer;
use crate::protocol::failure::{status, unknown_handle};
use crate::protocol::request;
use crate::protocol::rows;
use crate::protocol::ticket::Ticket;

/// The calls, over the data sets of a server.
#[derive(Clone, Debug)]
pub(super) struct Flight {
    sets: Arc<DataSets>,
    draining: Arc<AtomicBool>,
}

type Messages<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

impl Flight {
    pub(super) fn new(sets: Arc<DataSets>) -> Self {
        Self { sets, draining: Arc::default() }
    }

    /// Ends all streams after their present batch, and refuses new ones.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    fn check_running(&self) -> Result<(), Status> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(status(&Error::new(ErrorKind::Closed, "the service stops")));
        }
        Ok(())
    }

    /// Opens the corpus that `descriptor` asks for, on a thread that may wait.
    async fn found(&self, descriptor: FlightDescriptor) -> Result<(Arc<DataSet>, Answer), Status> {
        self.check_running()?;
        let sets = Arc::clone(&self.sets);
        let opening = tokio::task::spawn_blocking(move || {
            let request = request::Request::parse(&descriptor.cmd)?;
            let (set, description) = sets.get(&request)?;
            let answer = Answer { handle: set.handle.clone(), description };
            Ok((set, answer))
        });
        let opened =
            opening.await.map_err(|_| Status::internal("opening the corpus failed; this is a defect of forebay"))?;
        opened.map_err(|error: Error| status(&error))
    }

    /// The ticket for the first epoch of a data set, in default settings.
    fn whole(set: &DataSet) -> Ticket {
        let start = PassStart { growth: String::new(), epoch: 0, index: 0, batches: u64::MAX, parts: 1 };
        let config = Config { pad_to_multiple: set.opened.config().pad_to_multiple, ..Config::default() };
        Ticket::of(&set.handle, &config, &start)
    }

    /// The columns of a data set's batches in default settings.
    fn schema_of(set: &DataSet) -> Result<arrow_schema::SchemaRef> {
        let ticket = Self::whole(set);
        let loader = Loader::new(&set.opened, config_of(set.opened.config(), set.ids, &ticket)?)?;
        Ok(rows::schema(&loader.row_format(set.ids)))
    }
}

fn unimplemented(what: &str) -> Status {
    Status::unimplemented(format!("a forebay service has no {what}"))
}

#[tonic::async_trait]
impl FlightService for Flight {
    type HandshakeStream = Messages<HandshakeResponse>;
    type ListFlightsStream = Messages<FlightInfo>;
    type DoGetStream = Messages<FlightData>;
    type DoPutStream = Messages<PutResult>;
    type DoExchangeStream = Messages<FlightData>;
    type DoActionStream = Messages<arrow_flight::Result>;
    type ListActionsStream = Messages<ActionType>;

    async fn get_flight_info(&self, request: Request<FlightDescriptor>) -> Result<Response<FlightInfo>, Status> {
        let descriptor = request.into_inner();
        let (set, answer) = self.found(descriptor.clone()).await?;
        let schema = Self::schema_of(&set).map_err(|error| status(&error))?;
        let ticket = Self::whole(&set).to_bytes();
        let rows =
            answer.description.sources.iter().flat_map(|source| source.parts.last()).map(|part| part.extent.rows);
        let info = FlightInfo::new()
            .try_with_schema(&schema)
            .map_err(|error| Status::internal(error.to_string()))?
            .with_descriptor(descriptor)
            .with_endpoint(FlightEndpoint::new().with_ticket(arrow_flight::Ticket::new(ticket)))
            .with_total_records(i64::try_from(rows.sum::<u64>()).unwrap_or(-1))
            .with_total_bytes(-1)
            .with_ordered(true)
            .with_app_metadata(answer.to_bytes());
        Ok(Response::new(info))
    }

    async fn get_schema(&self, request: Request<FlightDescriptor>) -> Result<Response<SchemaResult>, Status> {
        let (set, _) = self.found(request.into_inner()).await?;
        let schema = Self::schema_of(&set).map_err(|error| status(&error))?;
        let result: Result<SchemaResult, _> = SchemaAsIpc::new(&schema, &IpcWriteOptions::default()).try_into();
        result.map(Response::new).map_err(|error| Status::internal(error.to_string()))
    }

    async fn do_get(&self, request: Request<arrow_flight::Ticket>) -> Result<Response<Self::DoGetStream>, Status> {
        self.check_running()?;
        let ticket = Ticket::parse(&request.into_inner().ticket).map_err(|error| status(&error))?;
        let set = self.sets.by_handle(&ticket.handle).ok_or_else(|| unknown_handle(&ticket.handle))?;
        let (messages, received) = tokio::sync::mpsc::channel(QUEUE);
        let (set, draining) = (InUse::new(&set), Arc::clone(&self.draining));
        let stream = Stream { set, ticket, messages, draining, is_watched: true };
        stream.start().map_err(|error| Status::unavailable(format!("cannot start a thread: {error}")))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(received))))
    }

    async fn do_action(&self, request: Request<Action>) -> Result<Response<Self::DoActionStream>, Status> {
        if request.get_ref().r#type != "health" {
            return Err(unimplemented("other action than `health`"));
        }
        self.check_running()?;
        let body = serde_json::json!({ "ready": true, "forebay": env!("CARGO_PKG_VERSION") });
        let result = arrow_flight::Result::new(body.to_string().into_bytes());
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(result)]))))
    }

    async fn list_actions(&self, _: Request<Empty>) -> Result<Response<Self::ListActionsStream>, Status> {
        let health =
            ActionType { r#type: "health".to_owned(), description: "Tells whether the service is ready".to_owned() };
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(health)]))))
    }

    async fn handshake(
        &self,
        _: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        Err(unimplemented("handshake"))
    }

    async fn list_flights(&self, _: Request<Criteria>) -> Result<Response<Self::ListFlightsStream>, Status> {
        Err(unimplemented("list of flights"))
    }

    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<PollInfo>, Status> {
        Err(unimplemented("polling"))
    }

    async fn do_put(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoPutStream>, Status> {
        Err(unimplemented("uploads"))
    }

    async fn do_exchange(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoExchangeStream>, Status> {
        Err(unimplemented("exchange"))
    }
}
