//! Loader and its passes: convert, detach, one call, convert.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};

use forebay::loader::state::{State, StateValue};
use forebay::loader::{Cancel, MAX_EPOCH};
use forebay::observe::stats::verdict_of;
use forebay::settings::environment::Environment;
use forebay::settings::{self, Config, DataFormat, Epochs, Io, Remainder, Resolved, Scope, Shuffle, Split, Targets};
use forebay::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::batch::Batch;
use crate::error::{detached, to_python};
use crate::notices;
use crate::pass::{Batches, SLICE, SharedLoader};

/// The verdict on a loader of any dataset.
#[pyfunction]
pub(crate) fn verdict_of_dataset(batches: u64, wait_share: f64) -> String {
    let remedy = "more `num_workers`; where its Python holds the interpreter, python3.14t";
    verdict_of(batches, wait_share, "the dataset's own code", remedy)
}

/// Settings in force if these are given: values, where each is from, warnings, and notes. `from_env`: the environment may give all of them.
#[pyfunction]
#[allow(clippy::type_complexity)] // a tuple of Python's own types
pub(crate) fn resolve<'py>(
    py: Python<'py>,
    settings: Vec<(String, String)>,
    from_env: bool,
) -> PyResult<(Bound<'py, PyDict>, Bound<'py, PyDict>, Vec<String>, Vec<String>)> {
    let resolved = detached(py, || resolved(&settings, from_env))?;
    let origins = PyDict::new(py);
    for origin in &resolved.origins {
        origins.set_item(origin.name, &origin.origin)?;
    }
    Ok((config_dict(py, &resolved.config)?, origins, resolved.warnings, resolved.notes))
}

fn resolved(settings: &[(String, String)], from_env: bool) -> forebay::Result<Resolved> {
    let scope = if from_env { Scope::All } else { Scope::OperationalOnly };
    settings::resolve(settings, &Environment::current(), scope)
}

/// Every setting as a Python value.
fn config_dict<'py>(py: Python<'py>, config: &Config) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("data", &config.data)?;
    dict.set_item("mixture", &config.mixture)?;
    dict.set_item(
        "format",
        match config.format {
            DataFormat::Auto => "auto",
            DataFormat::Parquet => "parquet",
            DataFormat::Arrow => "arrow",
        },
    )?;
    dict.set_item("token_column", &config.token_column)?;
    dict.set_item("fields", &config.fields)?;
    dict.set_item("seq_len", config.seq_len)?;
    dict.set_item("targets", if config.targets == Targets::Shifted { "shifted" } else { "labels" })?;
    dict.set_item("bos_id", config.bos_id)?;
    dict.set_item("eos_id", config.eos_id)?;
    match config.shuffle {
        Shuffle::Off => dict.set_item("shuffle", false)?,
        Shuffle::On => dict.set_item("shuffle", true)?,
        Shuffle::Global => dict.set_item("shuffle", "global")?,
        Shuffle::Block => dict.set_item("shuffle", "block")?,
    }
    dict.set_item("seed", config.seed)?;
    dict.set_item("chunk_tokens", config.chunk_tokens)?;
    dict.set_item("window_tokens", config.window_tokens)?;
    dict.set_item("lanes", config.lanes)?;
    dict.set_item("holdout", config.holdout)?;
    dict.set_item("split", if config.split == Split::Holdout { "holdout" } else { "train" })?;
    dict.set_item("skip", config.skip.iter().map(|skip| (skip.epoch, skip.start, skip.end)).collect::<Vec<_>>())?;
    dict.set_item("extend", config.extend)?;
    dict.set_item("batch_size", config.batch_size)?;
    dict.set_item("dp_rank", config.dp_rank)?;
    dict.set_item("dp_world_size", config.dp_world_size)?;
    dict.set_item("model_parallel_size", config.model_parallel_size)?;
    match config.epochs {
        Epochs::Count(count) => dict.set_item("epochs", count)?,
        Epochs::Endless => dict.set_item("epochs", "endless")?,
    }
    dict.set_item("max_steps", config.max_steps)?;
    dict.set_item(
        "remainder",
        match config.remainder {
            Remainder::Drop => "drop",
            Remainder::Pad => "pad",
            Remainder::Wrap => "wrap",
            Remainder::Short => "short",
        },
    )?;
    dict.set_item("pad_id", config.pad_id)?;
    dict.set_item("input_dtype", config.input_dtype.name())?;
    dict.set_item("sample_ids", config.sample_ids)?;
    dict.set_item("num_threads", config.num_threads)?;
    dict.set_item("cpu_affinity", &config.cpu_affinity)?;
    dict.set_item("thread_priority", config.thread_priority)?;
    dict.set_item("prefetch_batches", config.prefetch_batches)?;
    dict.set_item("memory_budget", config.memory_budget)?;
    dict.set_item("block_tokens", config.block_tokens)?;
    dict.set_item(
        "io",
        match config.io {
            Io::Auto => "auto",
            Io::Mmap => "mmap",
            Io::Pread => "pread",
        },
    )?;
    dict.set_item("cache_dir", &config.cache_dir)?;
    dict.set_item("pin_memory", config.pin_memory)?;
    dict.set_item("delivery_log", &config.delivery_log)?;
    Ok(dict)
}

/// A loader over one corpus.
#[pyclass(frozen, module = "forebay._core")]
pub(crate) struct Loader {
    inner: Arc<forebay::Loader>,
    process: u32,
}

#[pymethods]
impl Loader {
    /// Opens the corpus under the settings that `resolve` gives for the same arguments.
    #[staticmethod]
    fn open(py: Python<'_>, settings: Vec<(String, String)>, from_env: bool) -> PyResult<Self> {
        let config = detached(py, || Ok(resolved(&settings, from_env)?.config))?;
        let inner = Arc::new(opened(py, config)?);
        notices::tell(py)?;
        Ok(Self { inner, process: std::process::id() })
    }

    /// Several consumers of this loader.
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
        SharedLoader::new(py, &self.inner, count, ahead, external)
    }

    fn iter(&self) -> Batches {
        Batches::new(self.inner.iter())
    }

    fn iter_external(&self) -> Batches {
        Batches::new(self.inner.iter_external())
    }

    /// Batches of a pass, or None where it has no end.
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

    fn seek(&self, py: Python<'_>, epoch: &Bound<'_, PyAny>, position: &Bound<'_, PyAny>) -> PyResult<()> {
        let epoch = counted(py, "epoch", epoch, MAX_EPOCH)?;
        let position = counted(py, "position", position, u64::MAX)?;
        detached(py, || self.inner.seek(epoch, position))
    }

    fn state<'py>(&self, py: Python<'py>) -> PyResult<Vec<(String, Bound<'py, PyAny>)>> {
        state_pairs(py, &self.inner.state())
    }

    fn load_state(&self, py: Python<'_>, pairs: Vec<(String, Bound<'_, PyAny>)>) -> PyResult<()> {
        let entries = pairs
            .into_iter()
            .map(|(key, value)| {
                let entry = if let Ok(text) = value.cast::<PyString>() {
                    StateValue::Text(text.to_str()?.to_owned())
                } else if let Ok(number) = value.extract() {
                    // Whatever has an index, such as an integer of NumPy's.
                    StateValue::Int(number)
                } else {
                    let text = format!("state is damaged: `{key}` must be a whole number or a word, found {value}");
                    return Err(to_python(py, &Error::new(ErrorKind::State, text)));
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
        epoch: &Bound<'_, PyAny>,
        step: &Bound<'_, PyAny>,
        rank: &Bound<'_, PyAny>,
        world_size: &Bound<'_, PyAny>,
    ) -> PyResult<Batch> {
        let epoch = counted(py, "epoch", epoch, MAX_EPOCH)?;
        let step = counted(py, "step", step, u64::MAX)?;
        let (rank, world_size) = (counted(py, "rank", rank, 1 << 32)?, counted(py, "world_size", world_size, 1 << 32)?);
        detached(py, || self.inner.batch_at(epoch, step, rank, world_size)).map(Batch::new)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.inner.stats();
        let dict = PyDict::new(py);
        dict.set_item("batches", stats.batches)?;
        dict.set_item("tokens", stats.tokens)?;
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
        let pages = PyDict::new(py);
        pages.set_item("plain", stats.decoded_pages.plain)?;
        pages.set_item("dictionary", stats.decoded_pages.dictionary)?;
        pages.set_item("delta", stats.decoded_pages.delta)?;
        pages.set_item("byte_stream_split", stats.decoded_pages.byte_stream_split)?;
        pages.set_item("row_groups_by_arrow", stats.decoded_pages.row_groups_by_arrow)?;
        dict.set_item("decoded_pages", pages)?;
        dict.set_item("cache_bytes", stats.cache_bytes)?;
        dict.set_item("buffer_bytes", stats.buffer_bytes)?;
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

    /// What makes these settings slow on this corpus.
    fn warnings(&self) -> Vec<String> {
        self.inner.warnings().to_vec()
    }

    fn verdict(&self) -> String {
        self.inner.stats().verdict()
    }

    /// Every setting in force.
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        config_dict(py, self.inner.config())
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

/// Opens a loader on a thread of its own, and checks signals meanwhile. A signal that raises stops the opening.
fn opened(py: Python<'_>, config: Config) -> PyResult<forebay::Loader> {
    let cancel = Cancel::default();
    let (sender, mut receiver) = sync_channel(1);
    let opening = {
        let cancel = cancel.clone();
        move || {
            let opened = catch_unwind(AssertUnwindSafe(|| forebay::Loader::open_cancellable(config, &cancel)));
            // If nobody waits any more, the loader closes here.
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
            // A panic goes on here, where it becomes an exception.
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

/// `count`, or None where there is no end.
fn finite(count: u64) -> Option<u64> {
    Some(count).filter(|count| *count < u64::MAX)
}

/// A whole number from 0 to `most`, from whatever Python object has an index.
pub(crate) fn counted(py: Python<'_>, name: &str, value: &Bound<'_, PyAny>, most: u64) -> PyResult<u64> {
    value.extract::<u64>().ok().filter(|number| *number <= most).ok_or_else(|| {
        let limit = if most == u64::MAX { "2^64 - 1".to_owned() } else { most.to_string() };
        to_python(py, &Error::config(format!("`{name}` must be a whole number from 0 to {limit}, found {value}")))
    })
}
