//! The Hugging Face Hub: files of a data set at a fixed revision.
//!
//! The revision is resolved to a commit once. Files of a commit never change.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use tokio::sync::OnceCell;

use crate::error::{Error, Kind};
use crate::transport::{Transport, wait_if_asked};
use crate::{Meta, Options, credentials};

/// A repository of the Hub.
#[derive(Debug)]
pub(crate) struct Hub {
    /// The location up to the key.
    root: String,
    /// The address of the Hub.
    endpoint: String,
    /// The kind and the name of the repository, as in `datasets/ORG/NAME`.
    repository: String,
    revision: String,
    token: Option<String>,
    client: reqwest::Client,
    transport: Transport,
    /// The commit of the revision.
    commit: OnceCell<String>,
}

impl Hub {
    pub(crate) fn new(root: &str, name: &str, options: &Options, transport: &Transport) -> Result<Self, Error> {
        let (repository, revision) = name.split_once('@').unwrap_or((name, "main"));
        if repository.split('/').count() != 3 || !repository.starts_with("datasets/") {
            let text = "expected `hf://datasets/ORG/NAME[@REVISION]/PATH`";
            return Err(Error::new(Kind::Unsupported, text));
        }
        let client = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(10).min(options.deadline))
            .read_timeout(Duration::from_secs(30).min(options.deadline))
            .build()
            .map_err(|error| Error::new(Kind::Other, error.to_string()))?;
        Ok(Self {
            root: root.to_owned(),
            endpoint: options.endpoint.clone().unwrap_or_else(credentials::hub_endpoint),
            repository: repository.to_owned(),
            revision: revision.replace('/', "%2F"),
            token: if options.anonymous { None } else { credentials::hub_token() },
            client,
            transport: transport.clone(),
            commit: OnceCell::new(),
        })
    }

    /// Sends a GET request until it succeeds or fails for good. The deadline of the caller ends it.
    async fn send(&self, url: &str, range: Option<Range<u64>>) -> Result<(HeaderMap, Bytes), Error> {
        let mut wait = Duration::from_millis(100);
        let mut tries = 0;
        loop {
            let mut request = self.client.get(url);
            if let Some(token) = &self.token {
                request = request.bearer_auth(token);
            }
            if let Some(range) = &range {
                request = request.header("range", format!("bytes={}-{}", range.start, range.end - 1));
            }
            tries += 1;
            let place = self.transport.place().await;
            let error = match request.send().await {
                Ok(answer) => {
                    let (status, headers) = (answer.status(), answer.headers().clone());
                    let body = answer.bytes().await;
                    drop(place);
                    match body {
                        Ok(body) if status.is_success() => return Ok((headers, body)),
                        Ok(body) => {
                            let error = Error::of_status(status.as_u16(), &String::from_utf8_lossy(&body));
                            if error.kind() != Kind::Unavailable {
                                return Err(error);
                            }
                            let after = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok());
                            wait_if_asked(status.as_u16(), after).await;
                            error
                        }
                        Err(_) => Error::new(Kind::Damaged, "the answer ended before its end"),
                    }
                }
                Err(error) => Error::new(Kind::Unavailable, error.without_url().to_string()),
            };
            if tries >= 10 {
                return Err(error);
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(10));
        }
    }

    async fn commit(&self) -> Result<&str, Error> {
        let find = || async {
            let url = format!("{}/api/{}/revision/{}", self.endpoint, self.repository, self.revision);
            let (_, body) = self.send(&url, None).await?;
            let answer: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
            let commit = answer.get("sha").and_then(serde_json::Value::as_str).map(str::to_owned);
            commit.ok_or_else(|| Error::new(Kind::Other, "the Hub names no commit for this revision"))
        };
        self.commit.get_or_try_init(find).await.map(String::as_str)
    }

    pub(crate) async fn list(&self, key: &str) -> Result<Vec<Meta>, Error> {
        let commit = self.commit().await?;
        let folder = if key.is_empty() { String::new() } else { format!("/{}", escaped(key)) };
        let mut url = format!("{}/api/{}/tree/{commit}{folder}?recursive=true", self.endpoint, self.repository);
        let mut found = Vec::new();
        loop {
            let (headers, body) = match self.send(&url, None).await {
                Ok(answer) => answer,
                // A folder that is not there is empty, as in the other stores.
                Err(error) if error.kind() == Kind::NotFound => return Ok(found),
                Err(error) => return Err(error),
            };
            let entries: Vec<serde_json::Value> = serde_json::from_slice(&body)
                .map_err(|_| Error::new(Kind::Other, "the Hub's listing is no list in JSON"))?;
            found.extend(entries.iter().filter_map(|entry| self.meta(entry)));
            let next = headers.get("link").and_then(|link| next_page(link.to_str().ok()?));
            match next {
                // The token goes to the Hub alone.
                Some(next) if next.starts_with(&self.endpoint) => url = next,
                _ => return Ok(found),
            }
        }
    }

    fn meta(&self, entry: &serde_json::Value) -> Option<Meta> {
        let text = |value: &serde_json::Value, key: &str| value.get(key)?.as_str().map(str::to_owned);
        if text(entry, "type")? != "file" {
            return None;
        }
        let version = entry.get("lfs").and_then(|lfs| text(lfs, "oid")).or_else(|| text(entry, "oid"));
        Some(Meta {
            url: format!("{}/{}", self.root, text(entry, "path")?),
            size_bytes: entry.get("size")?.as_u64()?,
            modified: None,
            etag: version,
        })
    }

    pub(crate) async fn head(&self, key: &str) -> Result<Meta, Error> {
        let folder = key.rsplit_once('/').map_or("", |(folder, _)| folder);
        let url = format!("{}/{key}", self.root);
        let found = self.list(folder).await?.into_iter().find(|meta| meta.url == url);
        found.ok_or_else(|| Error::new(Kind::NotFound, "no such file in the repository"))
    }

    pub(crate) async fn get(&self, key: &str, range: Range<u64>) -> Result<Bytes, Error> {
        let commit = self.commit().await?;
        let url = format!("{}/{}/resolve/{commit}/{}", self.endpoint, self.repository, escaped(key));
        Ok(self.send(&url, Some(range)).await?.1)
    }
}

/// The URL of the next page in a header `Link`.
fn next_page(link: &str) -> Option<String> {
    let part = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    let url = part.split_once('<')?.1.split_once('>')?.0;
    Some(url.to_owned())
}

/// `key` with all bytes escaped that have a meaning in a URL.
fn escaped(key: &str) -> String {
    let mut text = String::with_capacity(key.len());
    for byte in key.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'~' => text.push(byte as char),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_found() {
        let link = r#"<https://hub/api/x?cursor=a>; rel="next", <https://hub/api>; rel="first""#;
        assert_eq!(next_page(link).as_deref(), Some("https://hub/api/x?cursor=a"));
        assert_eq!(next_page(r#"<https://hub/api>; rel="first""#), None);
    }

    #[test]
    fn keys_are_escaped() {
        assert_eq!(escaped("a b/c=1+2.parquet"), "a%20b/c%3D1%2B2.parquet");
    }
}
