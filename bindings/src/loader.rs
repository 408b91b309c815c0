//! The loader in Python.
//!
//! Each method converts, detaches, makes one call, and converts the result.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};

use forebay::batch_source::BatchSource;
use forebay::loader::state::{State, StateValue};
use forebay::loader::{Cancel, MAX_EPOCH, PassOptions};
use forebay::observe::stats::verdict_of;
use forebay::settings::Config;
use forebay::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::batch::Batch;
use crate::error::{detached, to_python};
use crate::notices;
use crate::pass::{Batches, SLICE, SharedLoader};
use crate::settings::{self, Settings};

/// Tells in one line whether the consumers or the dataset of any loader are slower.
#[pyfunction]
pub(crate) fn verdict_of_dataset(batches: u64, wait_share: f64) -> String {
    let remedy = "more `num_workers`; where its Python holds the interpreter, python3.14t";
    verdict_of(batches, wait_share, "the dataset's own code", remedy)
}

/// Longest text of a state. Texts that a loader saves are far shorter.
const MAX_STATE_TEXT: usize = 64 << 10;
/// Most characters of a wrong value that a message shows.
const SHOWN_CHARS: usize = 100;

/// A loader over one corpus.
#[pyclass(frozen, module = "forebay._core")]
pub(crate) struct Loader {
    inner: Arc<forebay::Loader>,
    process: u32,
}

#[pymethods]
impl Loader {
    /// Opens the corpus under `settings`.
    ///
    /// `can_pin` tells whether its batches can lie in page-locked memory.
    #[staticmethod]
    fn open(py: Python<'_>, settings: &Settings, can_pin: bool) -> PyResult<Self> {
        if !can_pin {
            settings.resolved.refuse_pinning().map_err(|error| to_python(py, &error))?;
        }
        let inner = Arc::new(opened(py, settings.resolved.config.clone())?);
        detached(py, || forebay_service::metrics::watch(&inner))?;
        notices::tell(py)?;
        Ok(Self { inner, process: std::process::id() })
    }

    /// Shares this loader among several consumers.
    #[pyo3(signature = (count, ahead, external))]
    fn split(
        &self,
        py: Python<'_>,
        count: &Bound<'_, PyAny>,
        ahead: Option<&Bound<'_, PyAny>>,
        external: bool,
    ) -> PyResult<SharedLoader> {
        let count = counted(py, "count", count, u64::from(u32::MAX))?;
        let ahead = ahead.map(|ahead| counted(py, "ahead", ahead, u64::MAX)).transpose()?;
        SharedLoader::new(py, Arc::clone(&self.inner) as _, count, ahead, external)
    }

    fn iter(&self, external: bool) -> Batches {
        Batches::new(BatchSource::begin(&*self.inner, PassOptions { external, ..PassOptions::default() }))
    }

    /// Number of batches in a pass. None if it has no end.
    #[getter]
    fn len(&self) -> Option<u64> {
        finite(self.inner.len())
    }

    #[getter]
    fn num_sequences(&self) -> Option<u64> {
        finite(self.inner.num_sequences())
    }

    #[getter]
    fn num_tokens(&self) -> Option<u64> {
        finite(self.inner.num_tokens())
    }

    #[getter]
    fn dropped_tokens(&self) -> u64 {
        self.inner.dropped_tokens()
    }

    #[getter]
    fn epoch(&self) -> u64 {
        self.inner.epoch()
    }

    fn set_epoch(&self, py: Python<'_>, epoch: &Bound<'_, PyAny>) -> PyResult<()> {
        self.inner.set_epoch(counted(py, "epoch", epoch, MAX_EPOCH)?);
        Ok(())
    }

    fn seek(&self, py: Python<'_>, position: &Bound<'_, PyAny>, epoch: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let epoch = epoch.map_or(Ok(self.inner.epoch()), |epoch| counted(py, "epoch", epoch, MAX_EPOCH))?;
        let position = counted(py, "position", position, u64::MAX)?;
        detached(py, || self.inner.seek(epoch, position))
    }

    fn state<'py>(&self, py: Python<'py>) -> PyResult<Vec<(String, Bound<'py, PyAny>)>> {
        state_pairs(py, &self.inner.state())
    }

    fn load_state(&self, py: Python<'_>, pairs: Vec<(String, Bound<'_, PyAny>)>) -> PyResult<()> {
        // A checkpoint holds the state under a key of its own.
        let is_state = |value: &Bound<'_, PyAny>| {
            let state = value.cast::<PyDict>();
            state.is_ok_and(|state| ["version", "position"].iter().all(|key| state.contains(key).unwrap_or(false)))
        };
        if let Some((key, _)) = pairs.iter().find(|(_, value)| is_state(value)) {
            let text =
                format!("this dict holds a state under `{key}`: give that value, such as `checkpoint[\"{key}\"]`");
            return Err(to_python(py, &Error::new(ErrorKind::State, text)));
        }
        let entries = pairs
            .into_iter()
            .map(|(key, value)| {
                let damaged = |text: String| to_python(py, &Error::new(ErrorKind::State, text));
                let entry = if let Ok(text) = value.cast::<PyString>() {
                    let text = text.to_str()?;
                    if text.len() > MAX_STATE_TEXT {
                        let found = text.len();
                        let text = format!("`{key}` has {found} bytes: expected at most {MAX_STATE_TEXT}");
                        return Err(damaged(format!("state is damaged: {text}")));
                    }
                    StateValue::Text(text.to_owned())
                } else if let Ok(number) = value.extract() {
                    // Any object with an index is accepted, such as an integer of NumPy.
                    StateValue::Int(number)
                } else {
                    // A value that is nested deeply has no text.
                    let found = value.repr().map_or_else(|_| value.get_type().to_string(), |text| text.to_string());
                    let is_long = found.chars().count() > SHOWN_CHARS;
                    let mut found: String = found.chars().take(SHOWN_CHARS).collect();
                    if is_long {
                        found.push_str(" ...");
                    }
                    let text = format!("`{key}` must be a whole number or a word, found {found}");
                    return Err(damaged(format!("state is damaged: {text}")));
                };
                Ok((key, entry))
            })
            .collect::<PyResult<Vec<_>>>()?;
        detached(py, || self.inner.load_state(&State::from_entries(entries)?))?;
        notices::tell(py)
    }

    fn sequences_at(
        &self,
        py: Python<'_>,
        epoch: &Bound<'_, PyAny>,
        position: &Bound<'_, PyAny>,
        n: &Bound<'_, PyAny>,
    ) -> PyResult<Batch> {
        let epoch = counted(py, "epoch", epoch, MAX_EPOCH)?;
        let (position, n) = (counted(py, "position", position, u64::MAX)?, counted(py, "n", n, u64::MAX)?);
        detached(py, || self.inner.sequences_at(epoch, position, n)).map(Batch::new)
    }

    fn batch_at(
        &self,
        py: Python<'_>,
        step: &Bound<'_, PyAny>,
        epoch: Option<&Bound<'_, PyAny>>,
        rank: Option<&Bound<'_, PyAny>>,
        world_size: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Batch> {
        let or_own = |name, value: Option<&Bound<'_, PyAny>>, most, own: u64| {
            value.map_or(Ok(own), |value| counted(py, name, value, most))
        };
        let config = self.inner.config();
        let step = counted(py, "step", step, u64::MAX)?;
        let epoch = or_own("epoch", epoch, MAX_EPOCH, self.inner.epoch())?;
        let rank = or_own("rank", rank, 1 << 32, config.dp_rank.unwrap_or(0))?;
        let world_size = or_own("world_size", world_size, 1 << 32, config.dp_world_size.unwrap_or(1))?;
        detached(py, || self.inner.batch_at(epoch, step, rank, world_size)).map(Batch::new)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.inner.stats();
        let dict = PyDict::new(py);
        dict.set_item("batches", stats.batches)?;
        dict.set_item("tokens", stats.tokens)?;
        dict.set_item("padding_share", stats.padding_share)?;
        dict.set_item("truncated_documents", stats.lost.truncated_documents)?;
        dict.set_item("truncated_tokens", stats.lost.truncated_tokens)?;
        dict.set_item("dropped_documents", stats.lost.dropped_documents)?;
        dict.set_item("dropped_tokens", stats.lost.dropped_tokens)?;
        dict.set_item("substituted_rows", stats.substituted_rows)?;
        dict.set_item("bytes", stats.bytes)?;
        dict.set_item("elapsed_seconds", stats.elapsed_seconds)?;
        dict.set_item("tokens_per_second", stats.tokens_per_second)?;
        dict.set_item("bytes_per_second", stats.bytes_per_second)?;
        dict.set_item("wait_seconds", stats.wait_seconds)?;
        dict.set_item("wait_share", stats.wait_share)?;
        dict.set_item("wait_p50_seconds", stats.wait_p50_seconds)?;
        dict.set_item("wait_p99_seconds", stats.wait_p99_seconds)?;
        dict.set_item("queue_depth_mean", stats.queue_depth_mean)?;
        dict.set_item("decode_seconds", stats.decode_seconds)?;
        dict.set_item("fill_seconds", stats.fill_seconds)?;
        dict.set_item("decoded_blocks", stats.decoded_blocks)?;
        dict.set_item("decoded_bytes", stats.decoded_bytes)?;
        dict.set_item("found_blocks", stats.found_blocks)?;
        let pages = PyDict::new(py);
        pages.set_item("plain", stats.decoded_pages.plain)?;
        pages.set_item("dictionary", stats.decoded_pages.dictionary)?;
        pages.set_item("delta", stats.decoded_pages.delta)?;
        pages.set_item("byte_stream_split", stats.decoded_pages.byte_stream_split)?;
        pages.set_item("row_groups_by_arrow", stats.decoded_pages.row_groups_by_arrow)?;
        dict.set_item("decoded_pages", pages)?;
        dict.set_item("cache_bytes", stats.cache_bytes)?;
        dict.set_item("buffer_bytes", stats.buffer_bytes)?;
        dict.set_item("storage_requests", stats.storage.requests)?;
        dict.set_item("storage_bytes", stats.storage.bytes)?;
        let sources = stats.sources.iter().map(|source| {
            let dict = PyDict::new(py);
            dict.set_item("name", &source.name)?;
            dict.set_item("sequences", source.sequences)?;
            dict.set_item("tokens", source.tokens)?;
            dict.set_item("epochs", source.epochs)?;
            dict.set_item("share", source.share)?;
            Ok(dict)
        });
        dict.set_item("sources", sources.collect::<PyResult<Vec<_>>>()?)?;
        Ok(dict)
    }

    /// The plan of a pass as JSON, and as lines of text.
    fn plan(&self, py: Python<'_>) -> PyResult<(String, String)> {
        detached(py, || forebay_cli::plan_of(&self.inner))
    }

    /// Reasons why these settings are slow on this corpus.
    fn warnings(&self) -> Vec<String> {
        self.inner.warnings().to_vec()
    }

    fn verdict(&self) -> String {
        self.inner.stats().verdict()
    }

    /// Every setting in force, by name.
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        settings::values(py, self.inner.config())
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        // A forked child has none of the threads that closing waits for.
        if std::process::id() != self.process {
            return Ok(());
        }
        detached(py, || {
            self.inner.close();
            Ok(())
        })
    }
}

/// Opens a loader on a separate thread, and checks signals meanwhile. A signal that raises stops
/// the opening.
fn opened(py: Python<'_>, config: Config) -> PyResult<forebay::Loader> {
    let cancel = Cancel::default();
    let (sender, mut receiver) = sync_channel(1);
    let opening = {
        let cancel = cancel.clone();
        move || {
            let opened = catch_unwind(AssertUnwindSafe(|| forebay_service::open(config, &cancel)));
            // If the caller no longer waits, the loader closes here.
            let _ = sender.send(opened);
        }
    };
    let started = std::thread::Builder::new().name("forebay-open".to_owned()).spawn(opening);
    started.map_err(|error| {
        let failed = Error::new(ErrorKind::Io, "cannot start a thread for opening the corpus").with_source(error);
        to_python(py, &failed)
    })?;
    loop {
        let found;
        (found, receiver) = py.detach(move || (receiver.recv_timeout(SLICE), receiver));
        match found {
            // A panic continues here, and becomes an exception.
            Ok(opened) => return detached(py, || opened.unwrap_or_else(|panic| resume_unwind(panic))),
            Err(RecvTimeoutError::Timeout) => py.check_signals().inspect_err(|_| cancel.cancel())?,
            Err(RecvTimeoutError::Disconnected) => {
                let text = "the thread that opens the corpus ended without a result; this is a defect of forebay";
                return Err(to_python(py, &Error::new(ErrorKind::Internal, text)));
            }
        }
    }
}

/// Keys and values of a state, in its order.
pub(crate) fn state_pairs<'py>(py: Python<'py>, state: &State) -> PyResult<Vec<(String, Bound<'py, PyAny>)>> {
    let value = |value: &StateValue| -> PyResult<Bound<'py, PyAny>> {
        Ok(match value {
            StateValue::Int(value) => value.into_pyobject(py)?.into_any(),
            StateValue::Text(text) => PyString::new(py, text).into_any(),
        })
    };
    state.entries().iter().map(|(key, entry)| Ok((key.clone(), value(entry)?))).collect()
}

/// Returns `count`, or None if there is no end.
fn finite(count: u64) -> Option<u64> {
    Some(count).filter(|count| *count < u64::MAX)
}

/// Converts any Python object with an index to a whole number from 0 to `most`.
pub(crate) fn counted(py: Python<'_>, name: &str, value: &Bound<'_, PyAny>, most: u64) -> PyResult<u64> {
    value.extract::<u64>().ok().filter(|number| *number <= most).ok_or_else(|| {
        let limit = if most == u64::MAX { "2^64 - 1".to_owned() } else { most.to_string() };
        to_python(py, &Error::config(format!("`{name}` must be a whole number from 0 to {limit}, found {value}")))
    })
}
