//! State: a position in the global order, and the content it belongs to.
//!
//! A state is flat, small and the same on every rank, and has the same keys at every time. It
//! survives JSON, `torch.save`, distributed checkpoints that keep one rank's copy, and a change of
//! the world size. It holds the content settings themselves, so that a mismatch names both values.

use std::fmt;

use xxhash_rust::xxh3::xxh3_128;

use crate::error::{Error, ErrorKind, Result};

/// Version of the format of states.
pub const VERSION: u64 = 1;

/// Keys of the position. Every other key belongs to the content.
const POSITION_KEYS: [&str; 2] = ["epoch", "position"];

/// A value in a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateValue {
    /// A number from 0.
    Int(u64),
    /// A text, or the digest of a long text.
    Text(String),
}

impl StateValue {
    /// Keeps `text`, or its digest if it is long.
    pub(crate) fn short(text: String) -> Self {
        const LONGEST: usize = 120;
        if text.len() <= LONGEST {
            Self::Text(text)
        } else {
            Self::Text(format!("xxh3:{:032x}", xxh3_128(text.as_bytes())))
        }
    }
}

impl fmt::Display for StateValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int(value) => write!(f, "{value}"),
            Self::Text(text) => write!(f, "`{text}`"),
        }
    }
}

impl From<u64> for StateValue {
    fn from(value: u64) -> Self {
        Self::Int(value)
    }
}

impl From<&str> for StateValue {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

/// A saved position: an epoch, a position in it, and the content it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    entries: Vec<(String, StateValue)>,
}

impl State {
    /// Makes the state at `position` of `epoch`, for the content that `content` describes.
    pub(crate) fn new(epoch: u64, position: u64, content: &[(&'static str, StateValue)]) -> Self {
        let mut entries = vec![
            ("version".to_owned(), VERSION.into()),
            ("epoch".to_owned(), epoch.into()),
            ("position".to_owned(), position.into()),
        ];
        entries.extend(content.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        Self { entries }
    }

    /// Makes a state from keys and values of [`State::entries`].
    ///
    /// Fails if a key is missing, or if the state has another version.
    pub fn from_entries(entries: Vec<(String, StateValue)>) -> Result<Self> {
        let state = Self { entries };
        let version = state.int("version")?;
        if version != VERSION {
            return Err(refused(format!("state has version {version}, this forebay reads version {VERSION}")));
        }
        for key in POSITION_KEYS {
            state.int(key)?;
        }
        Ok(state)
    }

    /// Keys and values, in a fixed order.
    pub fn entries(&self) -> &[(String, StateValue)] {
        &self.entries
    }

    /// Epoch, from 0.
    pub fn epoch(&self) -> u64 {
        self.int("epoch").expect("checked when made")
    }

    /// Number of positions of the epoch that the callers of all ranks together have received.
    pub fn position(&self) -> u64 {
        self.int("position").expect("checked when made")
    }

    fn get(&self, key: &str) -> Option<&StateValue> {
        self.entries.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    pub(crate) fn int(&self, key: &str) -> Result<u64> {
        match self.get(key) {
            Some(StateValue::Int(value)) => Ok(*value),
            Some(value) => Err(refused(format!("state key `{key}` must be a number, found {value}"))),
            None => Err(refused(format!("state has no key `{key}`: it was not made by forebay, or is incomplete"))),
        }
    }

    pub(crate) fn text(&self, key: &str) -> Result<&str> {
        match self.get(key) {
            Some(StateValue::Text(text)) => Ok(text),
            Some(value) => Err(refused(format!("state key `{key}` must be a text, found {value}"))),
            None => Err(refused(format!("state has no key `{key}`: it was not made by forebay, or is incomplete"))),
        }
    }

    /// Fails unless this state belongs to `content`. The error names every difference.
    pub(crate) fn check(&self, content: &[(&'static str, StateValue)]) -> Result<()> {
        let differences: Vec<String> = content
            .iter()
            .filter_map(|(key, present)| match self.get(key) {
                Some(saved) if saved == present => None,
                Some(saved) if *key == "mixture" => Some(format!(
                    "`mixture` has another digest, {saved} when saved and {present} now: a source, weight, stage or rule that had begun by then was \
                     changed; a change is a new stage at the end of the list"
                )),
                Some(saved) => Some(format!("`{key}` was {saved} when saved and is {present} now")),
                None => Some(format!("`{key}` is missing in the state and is {present} now")),
            })
            .collect();
        if differences.is_empty() {
            return Ok(());
        }
        Err(refused(format!(
            "state belongs to other content: {}; resume with the saved settings and corpus, or start anew",
            differences.join(", ")
        )))
    }
}

pub(crate) fn refused(message: String) -> Error {
    Error::new(ErrorKind::State, message)
}
