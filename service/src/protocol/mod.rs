//! The protocol between servers and consumers.
//!
//! - [`request`]: the settings that a consumer asks `GetFlightInfo` for.
//! - [`description`]: what the server tells about the corpus.
//! - [`ticket`]: the batches that a consumer asks `DoGet` for.
//! - [`rows`]: record batches with the rows of a batch.
//! - [`failure`]: errors as statuses of gRPC.
//!
//! Requests, descriptions and tickets are JSON, so that any client of Arrow Flight can make them.

pub mod description;
pub mod failure;
pub mod request;
pub mod rows;
pub mod ticket;

use forebay::{Error, Result};
use serde_json::Value;

/// Version of this protocol. Both sides must have the same.
pub const VERSION: u64 = 1;

/// Largest request or ticket, in bytes.
pub const MOST_BYTES: usize = 1 << 20;

/// Parses `bytes` as an object of JSON, and checks its version.
fn object(what: &str, bytes: &[u8]) -> Result<serde_json::Map<String, Value>> {
    if bytes.len() > MOST_BYTES {
        return Err(Error::config(format!("the {what} has {} bytes, more than {MOST_BYTES}", bytes.len())));
    }
    let Ok(Value::Object(object)) = serde_json::from_slice(bytes) else {
        return Err(Error::config(format!("the {what} is no object of JSON")));
    };
    let version = number(&object, "version")?;
    if version != VERSION {
        return Err(Error::config(format!(
            "the {what} has version {version} of the protocol, this forebay {} speaks version {VERSION}: use the same \
             forebay on both sides",
            env!("CARGO_PKG_VERSION")
        )));
    }
    Ok(object)
}

fn number(object: &serde_json::Map<String, Value>, key: &str) -> Result<u64> {
    let value = object.get(key).unwrap_or(&Value::Null);
    value.as_u64().ok_or_else(|| Error::config(format!("`{key}` must be a whole number, found {value}")))
}

fn text<'a>(object: &'a serde_json::Map<String, Value>, key: &str) -> Result<&'a str> {
    let value = object.get(key).unwrap_or(&Value::Null);
    value.as_str().ok_or_else(|| Error::config(format!("`{key}` must be a text, found {value}")))
}

/// The settings under `key`, by name.
fn texts(object: &serde_json::Map<String, Value>, key: &str) -> Result<Vec<(String, String)>> {
    let value = object.get(key).unwrap_or(&Value::Null);
    let refused = || Error::config(format!("`{key}` must be an object of texts, found {value}"));
    let entries = value.as_object().ok_or_else(refused)?;
    entries.iter().map(|(name, value)| Ok((name.clone(), value.as_str().ok_or_else(refused)?.to_owned()))).collect()
}
