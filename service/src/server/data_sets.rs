//! The corpora that consumers asked for: opened at the first request, shared, closed when idle.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Component, Path};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forebay::loader::Opened;
use forebay::loader::description::OpenedDescription;
use forebay::settings::{self, SettingKind};
use forebay::tokens::Dtype;
use forebay::{Config, Error, Result};

use super::Options;
use crate::protocol::request::{Request, absolute, is_carried};

/// An opened corpus or mixture.
#[derive(Debug)]
pub(crate) struct DataSet {
    pub(crate) handle: String,
    pub(crate) opened: Arc<Opened>,
    /// Type of the ids that travel.
    pub(crate) ids: Dtype,
    streams: AtomicUsize,
    used: Mutex<Instant>,
}

/// A stream that uses a data set, which stays open meanwhile.
#[derive(Debug)]
pub(crate) struct InUse(pub(crate) Arc<DataSet>);

impl InUse {
    pub(crate) fn new(set: &Arc<DataSet>) -> Self {
        set.streams.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(set))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        *lock(&self.0.used) = Instant::now();
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A data set that one thread opens while others wait.
type Place = Arc<Mutex<Option<Arc<DataSet>>>>;

/// All data sets of a server.
#[derive(Debug)]
pub(crate) struct DataSets {
    config: Config,
    fixed: Vec<String>,
    /// The corpora that the configuration names, by absolute paths.
    named: Vec<Vec<String>>,
    /// Folders that the configuration names, by absolute paths.
    under: Vec<String>,
    idle: Duration,
    /// Places by the settings of the request.
    places: Mutex<HashMap<Vec<(String, String)>, Place>>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DataSets {
    pub(crate) fn new(options: &Options) -> Result<Self> {
        let all = |paths: &[String]| -> Vec<String> { paths.iter().map(|path| absolute(path)).collect() };
        let mut named: Vec<Vec<String>> = options.also.iter().map(|paths| all(paths)).collect();
        named.extend(options.config.corpora()?.iter().map(|(_, paths)| all(paths)).filter(|paths| !paths.is_empty()));
        let under = all(&options.under);
        if named.is_empty() && under.is_empty() {
            return Err(Error::config("no data: name a file, folder or pattern to serve, or a folder by `--under`"));
        }
        Ok(Self {
            config: options.config.clone(),
            fixed: options.fixed.clone(),
            named,
            under,
            idle: options.idle,
            places: Mutex::default(),
        })
    }

    /// The data set that `request` asks for. Opens it if no consumer has asked for it before.
    pub(crate) fn get(&self, request: &Request) -> Result<(Arc<DataSet>, OpenedDescription)> {
        let config = self.config_of(request)?;
        let key = Request::of(&config, &[])?.settings;
        let place = Arc::clone(lock(&self.places).entry(key.clone()).or_default());
        let mut found = lock(&place);
        let set = match &*found {
            Some(set) => Arc::clone(set),
            None => {
                let opened = Arc::new(Opened::open(&config)?);
                let description = opened.describe(&[]);
                let mut hash = DefaultHasher::new();
                key.hash(&mut hash);
                let parts = description.sources.iter().flat_map(|source| &source.parts);
                parts.for_each(|part| (part.shards, &part.fingerprint).hash(&mut hash));
                let set = Arc::new(DataSet {
                    handle: format!("{:016x}", hash.finish()),
                    opened,
                    ids: description.ids,
                    streams: AtomicUsize::new(0),
                    used: Mutex::new(Instant::now()),
                });
                *found = Some(Arc::clone(&set));
                set
            }
        };
        *lock(&set.used) = Instant::now();
        let description = set.opened.describe(&request.shards);
        Ok((set, description))
    }

    /// The data set with a handle.
    pub(crate) fn by_handle(&self, handle: &str) -> Option<Arc<DataSet>> {
        let places: Vec<Place> = lock(&self.places).values().cloned().collect();
        places.iter().find_map(|place| {
            // A place that is being opened has no handle yet.
            let found = place.try_lock().ok()?;
            found.as_ref().filter(|set| set.handle == handle).cloned()
        })
    }

    /// Closes data sets that no consumer has used for the time of `idle`.
    pub(crate) fn close_idle(&self) {
        lock(&self.places).retain(|_, place| {
            let Ok(found) = place.try_lock() else { return true };
            found
                .as_ref()
                .is_none_or(|set| set.streams.load(Ordering::Relaxed) > 0 || lock(&set.used).elapsed() < self.idle)
        });
    }

    /// The settings under which the corpora of `request` are opened. Fails if the configuration
    /// does not name its data, or fixes another value. The error names both values.
    fn config_of(&self, request: &Request) -> Result<Config> {
        let asked = request.config()?;
        let mut config = self.config.clone();
        let mut faults = Vec::new();
        for setting in settings::all().iter().filter(|setting| is_carried(setting)) {
            let (here, there) = (setting.text(&self.config), setting.text(&asked));
            let is_data = ["data", "mixture"].contains(&setting.name);
            if here != there && !is_data && self.fixed.iter().any(|name| name == setting.name) {
                faults.push(format!("`{}` is {here} at the service, the consumer has {there}", setting.name));
            }
            if !is_data {
                setting.set(&mut config, there.as_str())?;
            }
        }
        (config.data, config.mixture) = (asked.data.clone(), asked.mixture.clone());
        for (name, paths) in asked.corpora()? {
            let is_named = self.named.contains(&paths) || paths.iter().all(|path| self.is_under(path));
            if !is_named || paths.is_empty() {
                let source = if name.is_empty() { String::new() } else { format!(" of source `{name}`") };
                let served: Vec<String> = self.named.iter().map(|paths| settings::list_text(paths)).collect();
                let under: Vec<String> = self.under.iter().map(|folder| format!("all under {folder}")).collect();
                faults.push(format!(
                    "`data`{source} is {} at the service, the consumer has {}",
                    served.into_iter().chain(under).collect::<Vec<_>>().join(" or "),
                    settings::list_text(&paths)
                ));
            }
        }
        if !faults.is_empty() {
            return Err(Error::config(format!("the service has other content: {}", faults.join("; "))));
        }
        // Each stream has its own grouping.
        let default = Config::default();
        for setting in settings::all().iter().filter(|setting| setting.kind() == SettingKind::Grouping) {
            if !is_carried(setting) {
                setting.set(&mut config, setting.text(&default).as_str())?;
            }
        }
        if config.bucket.is_some() {
            // Rows of similar length lie side by side for batches of any length.
            config.pad_to_multiple = Some(1);
        }
        config.skip = Vec::new();
        config.extend = false;
        config.delivery_log = None;
        config.pin_memory = false;
        config.service = Vec::new();
        Ok(config)
    }

    /// Whether a folder of the configuration contains `path`.
    fn is_under(&self, path: &str) -> bool {
        let path = Path::new(path);
        let is_plain = path.is_absolute() && path.components().all(|part| part != Component::ParentDir);
        is_plain && self.under.iter().any(|folder| path.starts_with(folder))
    }
}
