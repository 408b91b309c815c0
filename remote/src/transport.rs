//! Sends requests: limits those in flight, and waits as long as a server asks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use tokio::sync::Semaphore;

/// Longest wait that a server may ask for. The deadline of the call ends it earlier.
const MOST_SECONDS: u64 = 300;

/// Requests of this process, and the bytes of their answers.
static REQUESTS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

/// The number of requests that this process has sent, and the bytes of the answers as their headers
/// tell them.
pub fn traffic() -> (u64, u64) {
    // The counters are statistics: no other memory depends on them.
    (REQUESTS.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed))
}

/// The way of all requests of a client.
#[derive(Clone, Debug)]
pub(crate) struct Transport {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Places for requests in flight.
    places: Semaphore,
    /// The last answer or error that was no success.
    trouble: Mutex<Option<String>>,
}

impl Transport {
    pub(crate) fn new(most_requests: usize) -> Self {
        let places = Semaphore::new(most_requests.max(1));
        Self { shared: Arc::new(Shared { places, trouble: Mutex::new(None) }) }
    }

    pub(crate) fn note(&self, trouble: String) {
        *self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(trouble);
    }

    pub(crate) fn last_trouble(&self) -> Option<String> {
        self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until a request may be sent.
    pub(crate) async fn place(&self) -> Option<tokio::sync::SemaphorePermit<'_>> {
        self.shared.places.acquire().await.ok()
    }
}

/// Waits as long as the header `Retry-After` asks, if the answer says that the server is busy.
pub(crate) async fn wait_if_asked(status: u16, retry_after: Option<&str>) {
    if !matches!(status, 429 | 500..=599) {
        return;
    }
    // A date in place of seconds is rare, and the usual wait applies.
    if let Some(seconds) = retry_after.and_then(|text| text.trim().parse::<u64>().ok()) {
        tokio::time::sleep(Duration::from_secs(seconds.min(MOST_SECONDS))).await;
    }
}

impl HttpConnector for Transport {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = object_store::client::ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(Service { inner, transport: self.clone() }))
    }
}

#[derive(Debug)]
struct Service {
    inner: HttpClient,
    transport: Transport,
}

#[async_trait::async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let place = self.transport.place().await;
        let has_body = request.method() != "HEAD";
        REQUESTS.fetch_add(1, Ordering::Relaxed);
        let answer = self.inner.execute(request).await;
        drop(place);
        if let Err(error) = &answer {
            self.transport.note(crate::error::deepest_text(error));
        }
        let answer = answer.map_err(|error| match error.kind() {
            // A connection that ends before the answer counts as an interrupted request, so that
            // it is tried again.
            HttpErrorKind::Unknown => HttpError::new(HttpErrorKind::Interrupted, error),
            _ => error,
        })?;
        if matches!(answer.status().as_u16(), 408 | 429 | 500..) {
            self.transport.note(format!("status {}", answer.status().as_u16()));
        }
        let length = answer.headers().get("content-length").and_then(|value| value.to_str().ok()?.parse().ok());
        BYTES.fetch_add(length.filter(|_| has_body).unwrap_or(0), Ordering::Relaxed);
        let retry_after = answer.headers().get("retry-after").and_then(|value| value.to_str().ok());
        let retry_after = retry_after.map(str::to_owned);
        wait_if_asked(answer.status().as_u16(), retry_after.as_deref()).await;
        Ok(answer)
    }
}
