//! Trace: writes what each thread does, in the trace event format that ui.perfetto.dev and
//! chrome://tracing open.
//!
//! Takes spans: a name, a thread, a start and an end. A worker puts its spans into a [`Tracer`] of
//! its own. The tracer writes them to the file by the hundred, and when it is dropped. Without a
//! trace, a tracer is empty and a span costs one branch.
//!
//! The file is valid JSON after each write: each write ends with the end of the array, and the next
//! one overwrites it. A trace ends at a limit of bytes, with a note. Times come from the monotonic
//! clock, so that all ranks of a machine share one time line. Does not know what a span means.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::notices::{self, Level};
use crate::sync::lock;

/// Number of spans that a thread keeps before it writes them.
const KEPT: usize = 512;
/// The end of the array. The next events overwrite it.
const CLOSER: &str = "\n]\n";

/// The open traces of this process. Loaders that name the same trace share its file, which stays
/// open.
static OPEN: Mutex<Option<Traces>> = Mutex::new(None);

/// Traces by path and process id.
type Traces = HashMap<(String, u32), Arc<Trace>>;

/// A file of events.
#[derive(Debug)]
pub(crate) struct Trace {
    path: PathBuf,
    elsewhere: bool,
    pid: u32,
    /// An instant, and the same instant on the clock that all processes of the machine share.
    origin: (Instant, Duration),
    sink: Mutex<Sink>,
    /// Whether the limit was reached. The thread that reaches it writes. A thread that reads a
    /// stale value only makes one useless check.
    ended: AtomicBool,
    /// Spans of threads that have no tracer, such as consumers.
    consumers: Mutex<Vec<Span>>,
}

#[derive(Debug)]
struct Sink {
    file: File,
    /// Offset of the closer in the file.
    end: u64,
    /// Threads whose names are in the file already.
    named: Vec<u64>,
    /// Offset that no event may pass.
    limit: u64,
    /// Set by the first failed write, and at the limit. Later writes do nothing, because a trace
    /// must not end a run.
    ended: bool,
}

/// A stretch of time that a thread spent on one thing.
#[derive(Clone, Copy, Debug)]
struct Span {
    name: &'static str,
    thread: u64,
    began: Instant,
    ended: Instant,
    number: Option<u64>,
}

impl Trace {
    /// Opens the trace that `pattern` names, or returns the open one.
    ///
    /// `{rank}` and `{pid}` in the pattern stand for this process's values. If another process
    /// writes that file, the name of the new file contains the process id. The trace ends after
    /// about `limit` bytes.
    pub(crate) fn open(pattern: &str, limit: u64, rank: u64, world_size: u64) -> Result<Arc<Self>> {
        let pid = std::process::id();
        let path = pattern.replace("{rank}", &rank.to_string()).replace("{pid}", &pid.to_string());
        let mut open = lock(&OPEN);
        let open = open.get_or_insert_default();
        if let Some(trace) = open.get(&(path.clone(), pid)) {
            return Ok(Arc::clone(trace));
        }
        let failed =
            |path: &Path, error| Error::io("cannot write the trace, which `FOREBAY_TRACE` names", error).at(path);
        let mut target = PathBuf::from(&path);
        let (mut file, free) = claim(&target).map_err(|error| failed(&target, error))?;
        if !free {
            let suffix = target.extension().map_or_else(String::new, |suffix| format!(".{}", suffix.to_string_lossy()));
            target.set_extension(format!("{pid}{suffix}"));
            file = claim(&target).map_err(|error| failed(&target, error))?.0;
        }
        let head = format!(
            "[\n{{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":{pid},\"args\":{{\"name\":\"forebay rank {rank} of {world_size}, pid {pid}\"}}}}"
        );
        file.set_len(0)
            .and_then(|()| file.write_all(format!("{head}{CLOSER}").as_bytes()))
            .map_err(|error| failed(&target, error))?;
        let sink = Sink { file, end: head.len() as u64, named: Vec::new(), limit, ended: false };
        let origin = (Instant::now(), since_boot());
        let trace = Arc::new(Self {
            path: target,
            elsewhere: !free,
            pid,
            origin,
            sink: Mutex::new(sink),
            ended: AtomicBool::new(false),
            consumers: Mutex::default(),
        });
        open.insert((path, pid), Arc::clone(&trace));
        Ok(trace)
    }

    /// Records a span of a thread without a tracer. The span began at `began` and ends now.
    pub(crate) fn span(&self, name: &'static str, began: Instant, number: Option<u64>) {
        let (thread, ended) = (self.thread(), Instant::now());
        let mut spans = lock(&self.consumers);
        spans.push(Span { name, thread, began, ended, number });
        if spans.len() >= KEPT {
            let full = std::mem::take(&mut *spans);
            drop(spans);
            self.write(&full);
        }
    }

    /// Writes the pending spans of threads without a tracer.
    pub(crate) fn flush(&self) {
        let spans = std::mem::take(&mut *lock(&self.consumers));
        self.write(&spans);
    }

    /// Number of the calling thread. The first call of a thread writes its name to the trace.
    fn thread(&self) -> u64 {
        thread_local!(static NUMBER: u64 = thread_number());
        let number = NUMBER.with(|number| *number);
        // A process has a handful of traces. Each thread looks here once per span and usually finds
        // this trace.
        thread_local!(static NAMED: std::cell::Cell<*const Trace> = const { std::cell::Cell::new(std::ptr::null()) });
        if NAMED.replace(self) != std::ptr::from_ref(self) {
            self.name_thread(number);
        }
        number
    }

    fn name_thread(&self, number: u64) {
        let mut sink = lock(&self.sink);
        if sink.named.contains(&number) {
            return;
        }
        sink.named.push(number);
        let name = std::thread::current().name().map_or_else(|| "consumer".to_owned(), str::to_owned);
        let text = format!(
            ",\n{{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":{},\"tid\":{number},\"args\":{{\"name\":{}}}}}",
            self.pid,
            serde_json::Value::from(name)
        );
        sink.append(&text);
    }

    fn write(&self, spans: &[Span]) {
        if spans.is_empty() || self.pid != std::process::id() {
            return;
        }
        if self.ended.load(Ordering::Relaxed) {
            return;
        }
        let mut text = String::with_capacity(spans.len() * 112);
        for span in spans {
            let began = self.origin.1.saturating_add(span.began.saturating_duration_since(self.origin.0)).as_nanos();
            let took = span.ended.saturating_duration_since(span.began).as_nanos();
            // Times are microseconds with three decimals, so that no nanosecond is lost.
            let _ = write!(
                text,
                ",\n{{\"name\":\"{}\",\"ph\":\"X\",\"pid\":{},\"tid\":{},\"ts\":{}.{:03},\"dur\":{}.{:03}",
                span.name,
                self.pid,
                span.thread,
                began / 1000,
                began % 1000,
                took / 1000,
                took % 1000
            );
            match span.number {
                Some(number) => drop(write!(text, ",\"args\":{{\"batch\":{number}}}}}")),
                None => text.push('}'),
            }
        }
        let mut sink = lock(&self.sink);
        if sink.has_room(&text) {
            sink.append(&text);
        } else if !sink.ended {
            self.end(&mut sink);
        }
    }

    /// Ends the trace at its limit, and says so in the file and in the log.
    #[cold]
    fn end(&self, sink: &mut Sink) {
        let limit = sink.limit;
        let text = format!("this trace has reached its limit of {limit} bytes and ends here");
        let now = (self.origin.1.saturating_add(self.origin.0.elapsed())).as_micros();
        sink.append(&format!(
            ",\n{{\"name\":\"{text}\",\"ph\":\"i\",\"s\":\"g\",\"pid\":{},\"tid\":0,\"ts\":{now}}}",
            self.pid
        ));
        sink.ended = true;
        self.ended.store(true, Ordering::Relaxed);
        let path = self.path.display();
        let text =
            format!("the trace `{path}` has reached {limit} bytes and ends; `FOREBAY_TRACE_LIMIT` sets the limit");
        notices::add(Level::Warning, text);
    }

    /// Path of the trace's file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Tells whether another process writes the requested file, so that this trace uses another
    /// one.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.elsewhere
    }
}

impl Sink {
    fn has_room(&self, text: &str) -> bool {
        !self.ended && self.end + text.len() as u64 <= self.limit
    }

    /// Writes `text` over the end of the array, followed by a new end, in one call.
    fn append(&mut self, text: &str) {
        if self.ended {
            return;
        }
        let whole = format!("{text}{CLOSER}");
        let written = self.file.seek(SeekFrom::Start(self.end)).and_then(|_| self.file.write_all(whole.as_bytes()));
        match written {
            Ok(()) => self.end += text.len() as u64,
            Err(_) => self.ended = true,
        }
    }
}

/// Opens or creates `path`, and tells whether no other process writes it.
fn claim(path: &Path) -> std::io::Result<(File, bool)> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    #[cfg(unix)]
    {
        use std::os::fd::AsRawFd;
        // SAFETY: the call takes an open descriptor and touches none of our memory.
        let locked = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0;
        Ok((file, locked))
    }
    #[cfg(not(unix))]
    Ok((file, true))
}

/// The system's number of the calling thread, or a number of our own where the system gives none.
fn thread_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    // On Linux, this is a link to `<pid>/task/<thread>`.
    let system = std::fs::read_link("/proc/thread-self").ok();
    let system = system.and_then(|path| path.file_name()?.to_str()?.parse().ok());
    system.unwrap_or_else(|| NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Time of the monotonic clock, which all processes of this machine share.
fn since_boot() -> Duration {
    #[cfg(unix)]
    {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call writes one `timespec` to the pointer, which points to a valid one.
        if unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) } == 0 {
            return Duration::new(now.tv_sec as u64, now.tv_nsec as u32);
        }
    }
    Duration::ZERO
}

/// The spans of one worker. Empty if nothing is traced.
#[derive(Debug, Default)]
pub(crate) struct Tracer(Option<Box<ThreadSpans>>);

#[derive(Debug)]
struct ThreadSpans {
    trace: Arc<Trace>,
    spans: Vec<Span>,
}

impl Drop for ThreadSpans {
    fn drop(&mut self) {
        self.trace.write(&self.spans);
    }
}

impl Tracer {
    pub(crate) fn new(trace: Option<&Arc<Trace>>) -> Self {
        Self(trace.map(|trace| Box::new(ThreadSpans { trace: Arc::clone(trace), spans: Vec::with_capacity(KEPT) })))
    }

    /// Start time of a new span, if spans are recorded.
    #[inline]
    pub(crate) fn begin(&self) -> Option<Instant> {
        self.0.as_ref().map(|_| Instant::now())
    }

    /// Ends the span that began at `began`. `number` is the batch that the span belongs to, if any.
    #[inline]
    pub(crate) fn end(&mut self, name: &'static str, began: Option<Instant>, number: Option<u64>) {
        if let (Some(own), Some(began)) = (&mut self.0, began) {
            own.add(name, began, Instant::now(), number);
        }
    }

    /// Adds a span from `began` to `ended` that belongs to no batch.
    pub(crate) fn add(&mut self, name: &'static str, began: Instant, ended: Instant) {
        if let Some(own) = &mut self.0 {
            own.add(name, began, ended, None);
        }
    }
}

impl ThreadSpans {
    #[cold]
    fn add(&mut self, name: &'static str, began: Instant, ended: Instant, number: Option<u64>) {
        self.spans.push(Span { name, thread: self.trace.thread(), began, ended, number });
        if self.spans.len() >= KEPT {
            self.trace.write(&self.spans);
            self.spans.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn events(path: &Path) -> Vec<Value> {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    /// The events while others write. A read that takes several calls may meet two states of the
    /// file, so that it is repeated.
    fn events_meanwhile(path: &Path) -> Vec<Value> {
        let whole = || serde_json::from_slice(&std::fs::read(path).unwrap()).ok();
        (0..1000).find_map(|_| whole()).expect("valid JSON in one of 1000 readings")
    }

    fn named(events: &[Value], name: &str) -> Vec<Value> {
        events.iter().filter(|event| event["name"] == name).cloned().collect()
    }

    #[test]
    fn spans_of_threads_are_valid_json_at_any_time() {
        let folder = tempfile::tempdir().unwrap();
        let asked = folder.path().join("rank-{rank}.json");
        let trace = Trace::open(asked.to_str().unwrap(), u64::MAX, 3, 8).unwrap();
        assert_eq!(trace.path(), folder.path().join("rank-3.json"));
        assert_eq!(events(trace.path())[0]["args"]["name"], format!("forebay rank 3 of 8, pid {}", std::process::id()));
        std::thread::scope(|scope| {
            for name in ["forebay-0", "forebay \"1\""] {
                let work = || {
                    let mut tracer = Tracer::new(Some(&trace));
                    for number in 0..2000 {
                        let outer = tracer.begin();
                        let inner = tracer.begin();
                        tracer.end("fill", inner, None);
                        tracer.end("batch", outer, Some(number));
                        if number % 500 == 0 {
                            events_meanwhile(trace.path());
                        }
                    }
                };
                std::thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, work).unwrap();
            }
        });
        trace.span("wait", Instant::now(), Some(7));
        trace.flush();
        let events = events(trace.path());
        let names: Vec<_> = named(&events, "thread_name").iter().map(|event| event["args"]["name"].clone()).collect();
        assert!(names.contains(&"forebay-0".into()) && names.contains(&"forebay \"1\"".into()), "{names:?}");
        let (batches, fills) = (named(&events, "batch"), named(&events, "fill"));
        assert_eq!((batches.len(), fills.len()), (4000, 4000));
        let place = |event: &Value| {
            let number = |key: &str| event[key].as_f64().unwrap();
            (event["tid"].as_u64().unwrap(), number("ts"), number("ts") + number("dur"))
        };
        for (batch, fill) in batches.iter().zip(&fills) {
            let ((thread, began, ended), (inside, from, to)) = (place(batch), place(fill));
            // A float of this size resolves about one nanosecond.
            assert!(thread == inside && began <= from + 1e-3 && to <= ended + 1e-3, "{batch} {fill}");
        }
        assert_eq!(named(&events, "wait")[0]["args"]["batch"], 7);
    }

    #[test]
    fn loaders_share_a_trace_and_processes_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let asked = folder.path().join("trace.json");
        let taken = std::fs::write(&asked, "what an earlier process has left, longer than a new trace ".repeat(9));
        taken.unwrap();
        let asked = asked.to_str().unwrap();
        let first = Trace::open(asked, u64::MAX, 0, 1).unwrap();
        assert!(Arc::ptr_eq(&first, &Trace::open(asked, u64::MAX, 0, 1).unwrap()));
        assert_eq!((events(first.path()).len(), first.is_elsewhere()), (1, false));

        // `flock` treats two open files of one process like the files of two processes.
        let other = folder.path().join("other.json");
        let (_held, free) = claim(&other).unwrap();
        assert!(free);
        let trace = Trace::open(other.to_str().unwrap(), u64::MAX, 0, 1).unwrap();
        assert_eq!(trace.path(), folder.path().join(format!("other.{}.json", std::process::id())));
        assert!(trace.is_elsewhere());
        let error = Trace::open(folder.path().join("no/folder.json").to_str().unwrap(), u64::MAX, 0, 1).unwrap_err();
        assert!(error.to_string().contains("FOREBAY_TRACE"), "{error}");
    }

    #[test]
    fn without_a_trace_nothing_is_kept() {
        let mut tracer = Tracer::new(None);
        let began = tracer.begin();
        assert!(began.is_none());
        tracer.end("fill", began, None);
        assert!(tracer.0.is_none());
    }

    #[test]
    fn a_trace_ends_at_its_limit_with_a_note() {
        let folder = tempfile::tempdir().unwrap();
        let asked = folder.path().join("trace.json");
        let trace = Trace::open(asked.to_str().unwrap(), 200_000, 0, 1).unwrap();
        let mut tracer = Tracer::new(Some(&trace));
        for number in 0..20_000 {
            let began = tracer.begin();
            tracer.end("batch", began, Some(number));
        }
        drop(tracer);
        let size = std::fs::metadata(trace.path()).unwrap().len();
        assert!((100_000..201_000).contains(&size), "{size}");
        let events = events(trace.path());
        let last = events.last().unwrap();
        assert!(last["name"].as_str().unwrap().contains("limit of 200000 bytes"), "{last}");
        assert_eq!(last["ph"], "i");
        let told = notices::take().into_iter().filter(|notice| notice.text.contains("FOREBAY_TRACE_LIMIT")).count();
        assert_eq!(told, 1);
    }
}
