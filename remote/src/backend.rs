//! The stores behind the schemes.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, RetryConfig};

use crate::error::{Error, Kind};
use crate::hub::Hub;
use crate::transport::Transport;
use crate::{Meta, Options, credentials};

/// Number of times that a body of the wrong length is asked for.
pub(crate) const TRIES_OF_A_BODY: u32 = 4;
/// Number of tries of a request. The deadline mostly ends them earlier.
const TRIES: usize = 30;
/// Time within which a server must accept a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Time without a byte after which an answer counts as lost.
const SILENCE: Duration = Duration::from_secs(30);

/// The schemes, each with its kind of store.
const SCHEMES: [(&str, Scheme); 6] = [
    ("s3", Scheme::S3),
    ("gs", Scheme::Google),
    ("az", Scheme::Azure),
    ("http", Scheme::Http),
    ("https", Scheme::Http),
    ("hf", Scheme::Hub),
];

/// The kind of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// Amazon S3, and servers that speak its protocol.
    S3,
    /// Google Cloud Storage.
    Google,
    /// Azure Blob Storage.
    Azure,
    /// Any web server.
    Http,
    /// The Hugging Face Hub.
    Hub,
}

/// The scheme of `location`, if it is known.
pub(crate) fn scheme(location: &str) -> Option<Scheme> {
    let (name, _) = location.split_once("://")?;
    SCHEMES.iter().find(|(known, _)| *known == name).map(|(_, scheme)| *scheme)
}

/// A URL in parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts<'a> {
    scheme: Scheme,
    /// The URL up to the key, without a slash at its end.
    pub(crate) store: &'a str,
    /// The name of the bucket, or the address of the server.
    name: &'a str,
    /// The key in the store.
    pub(crate) key: &'a str,
}

/// Splits `url` into the store and the key.
pub(crate) fn split(url: &str) -> Result<Parts<'_>, Error> {
    let unknown = || Error::new(Kind::Unsupported, "no store is known for this URL");
    let scheme = scheme(url).ok_or_else(unknown)?;
    let start = url.find("://").ok_or_else(unknown)? + 3;
    let end = match scheme {
        // `hf://datasets/ORG/NAME/key`.
        Scheme::Hub => url[start..].match_indices('/').nth(2).map_or(url.len(), |(at, _)| start + at),
        _ => url[start..].find('/').map_or(url.len(), |at| start + at),
    };
    let name = &url[start..end];
    if name.is_empty() {
        return Err(Error::new(Kind::NotFound, "the URL names no bucket or server"));
    }
    Ok(Parts { scheme, store: &url[..end], name, key: url[end..].trim_matches('/') })
}

/// A store.
#[derive(Debug)]
pub(crate) enum Backend {
    /// A store of the crate `object_store`.
    Objects {
        /// The URL up to the key.
        root: String,
        /// The store.
        store: Arc<dyn ObjectStore>,
        /// Whether the store can list objects.
        lists: bool,
    },
    /// A repository of the Hub.
    Hub(Hub),
}

/// Fails unless `endpoint` is the URL of a server. The libraries below panic at other text.
fn check_endpoint(endpoint: Option<&str>) -> Result<(), Error> {
    let is_url = |text: &str| {
        let host = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
        host.is_some_and(|host| {
            !host.is_empty() && !host.starts_with(['/', ':']) && !host.contains(char::is_whitespace)
        })
    };
    match endpoint.filter(|text| !is_url(text)) {
        None => Ok(()),
        Some(text) => Err(Error::new(
            Kind::Unsupported,
            format!("the endpoint must be a URL such as `http://localhost:9000`, found `{text}`"),
        )),
    }
}

impl Backend {
    pub(crate) fn new(parts: &Parts<'_>, options: &Options, transport: &Transport) -> Result<Self, Error> {
        let retry = RetryConfig {
            backoff: BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: CONNECT, base: 2.0 },
            max_retries: TRIES,
            retry_timeout: options.deadline,
        };
        // Plain HTTP is used only if the endpoint asks for it.
        let is_plain = |url: &str| url.starts_with("http://");
        let http = ClientOptions::new()
            .with_connect_timeout(CONNECT.min(options.deadline))
            .with_read_timeout(SILENCE.min(options.deadline))
            .with_timeout_disabled();
        let endpoint = options.endpoint.as_deref();
        check_endpoint(endpoint)?;
        let store: Arc<dyn ObjectStore> = match parts.scheme {
            Scheme::S3 => {
                let endpoint = endpoint.map(str::to_owned).or_else(credentials::aws_endpoint);
                check_endpoint(endpoint.as_deref())?;
                let mut builder = AmazonS3Builder::from_env().with_bucket_name(parts.name);
                if let Some(region) = options.region.clone().or_else(credentials::aws_region) {
                    builder = builder.with_region(region);
                }
                let allow = endpoint.as_deref().is_some_and(is_plain);
                if let Some(endpoint) = endpoint {
                    builder = builder.with_endpoint(endpoint);
                }
                if options.anonymous {
                    builder = builder.with_skip_signature(true);
                } else if let Some(provider) = credentials::aws_profile() {
                    builder = builder.with_credentials(provider);
                }
                let http = http.with_allow_http(allow);
                let builder = builder.with_retry(retry).with_client_options(http);
                Arc::new(builder.with_http_connector(transport.clone()).build().map_err(Error::of_store)?)
            }
            Scheme::Google => {
                let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(parts.name);
                let emulator = credentials::google_emulator();
                let endpoint = endpoint.map(str::to_owned).or_else(|| emulator.clone());
                let allow = endpoint.as_deref().is_some_and(is_plain);
                if let Some(endpoint) = &endpoint {
                    builder = builder.with_base_url(endpoint);
                }
                if options.anonymous || emulator.is_some() {
                    builder = builder.with_skip_signature(true);
                }
                let builder = builder.with_retry(retry).with_client_options(http.with_allow_http(allow));
                Arc::new(builder.with_http_connector(transport.clone()).build().map_err(Error::of_store)?)
            }
            Scheme::Azure => {
                let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(parts.name);
                let allow = endpoint.is_some_and(is_plain);
                if let Some(endpoint) = endpoint {
                    builder = builder.with_endpoint(endpoint.to_owned());
                }
                if options.anonymous {
                    builder = builder.with_skip_signature(true);
                }
                let builder = builder.with_retry(retry).with_client_options(http.with_allow_http(allow));
                Arc::new(builder.with_http_connector(transport.clone()).build().map_err(Error::of_store)?)
            }
            Scheme::Http => {
                let http = http.with_allow_http(is_plain(parts.store));
                let builder = HttpBuilder::new().with_url(parts.store).with_retry(retry).with_client_options(http);
                Arc::new(builder.with_http_connector(transport.clone()).build().map_err(Error::of_store)?)
            }
            Scheme::Hub => return Hub::new(parts.store, parts.name, options, transport).map(Self::Hub),
        };
        Ok(Self::Objects { root: parts.store.to_owned(), store, lists: parts.scheme != Scheme::Http })
    }

    pub(crate) async fn head(&self, key: &str) -> Result<Meta, Error> {
        match self {
            Self::Objects { root, store, .. } => {
                let found = store.head(&path(key)?).await.map_err(Error::of_store)?;
                Ok(meta(root, key, found))
            }
            Self::Hub(hub) => hub.head(key).await,
        }
    }

    pub(crate) async fn list(&self, key: &str) -> Result<Vec<Meta>, Error> {
        match self {
            Self::Objects { lists: false, .. } => Err(cannot_list()),
            Self::Objects { root, store, .. } => {
                let prefix = path(key)?;
                let found = store.list(Some(&prefix).filter(|_| !key.is_empty()));
                let found = found.map_ok(|object| {
                    let key = object.location.clone();
                    meta(root, key.as_ref(), object)
                });
                found.try_collect().await.map_err(Error::of_store)
            }
            Self::Hub(hub) => hub.list(key).await,
        }
    }

    pub(crate) async fn has_any(&self, key: &str) -> Result<bool, Error> {
        match self {
            Self::Objects { lists: false, .. } => Ok(false),
            Self::Objects { store, .. } => {
                let prefix = path(key)?;
                match store.list(Some(&prefix).filter(|_| !key.is_empty())).next().await {
                    None => Ok(false),
                    Some(Ok(_)) => Ok(true),
                    Some(Err(error)) => Err(Error::of_store(error)),
                }
            }
            Self::Hub(hub) => Ok(!hub.list(key).await?.is_empty()),
        }
    }

    pub(crate) async fn get(&self, key: &str, range: Range<u64>, etag: Option<&str>) -> Result<Bytes, Error> {
        match self {
            Self::Objects { store, .. } => {
                let options = GetOptions::new().with_range(Some(range)).with_if_match(etag);
                let found = store.get_opts(&path(key)?, options).await.map_err(Error::of_store)?;
                found.bytes().await.map_err(Error::of_store)
            }
            Self::Hub(hub) => hub.get(key, range).await,
        }
    }

    pub(crate) async fn put(&self, key: &str, bytes: Bytes) -> Result<(), Error> {
        match self {
            Self::Objects { store, .. } => {
                store.put(&path(key)?, bytes.into()).await.map(drop).map_err(Error::of_store)
            }
            Self::Hub(_) => Err(Error::new(Kind::Unsupported, "cannot write to the Hub: write to a local folder")),
        }
    }
}

fn cannot_list() -> Error {
    Error::new(Kind::Unsupported, "a web server lists no folders: name each file")
}

fn path(key: &str) -> Result<Path, Error> {
    Path::parse(key).map_err(|error| Error::new(Kind::NotFound, error.to_string()))
}

fn meta(root: &str, key: &str, object: ObjectMeta) -> Meta {
    Meta {
        url: format!("{root}/{key}"),
        size_bytes: object.size,
        modified: Some(object.last_modified.into()),
        etag: object.e_tag,
    }
}
