//! `forebay serve`: computes batches for consumers in other processes.
//!
//! The server is Rust alone, whether the wheel's command or a cargo build started it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use forebay::Error;
use forebay::settings::{self, Scope, SettingKind};
use forebay_service::server::{self, Address, Token};

use crate::{Context, Failure, Sets};

/// Whether the process was asked to end. The handler writes it, and the server reads it. No other
/// memory depends on it.
static STOPPED: AtomicBool = AtomicBool::new(false);

#[derive(Debug, clap::Args)]
#[command(after_help = "Consumers use the service by the setting `service` or the variable FOREBAY_SERVICE.\n\
    They choose the content settings that the server does not set. SIGTERM ends the server in order.\n\n\
    Example: forebay serve corpus/ --listen unix:/run/forebay.sock")]
pub(crate) struct Options {
    /// Files, folders and glob patterns of the corpus that consumers may ask for
    paths: Vec<String>,
    /// Address to listen at, once or more: `unix:PATH`, `grpc://HOST:PORT` or
    /// `grpc+tls://HOST:PORT`
    #[arg(long, value_name = "ADDRESS", required = true)]
    listen: Vec<String>,
    /// A further corpus that consumers may ask for: paths, separated by commas
    #[arg(long, value_name = "PATHS")]
    also: Vec<String>,
    /// A folder; consumers may ask for every corpus in it
    #[arg(long, value_name = "FOLDER")]
    under: Vec<String>,
    /// Seconds after which a corpus that nobody uses is closed
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    idle: u64,
    /// Number of a further user that may connect to a Unix socket
    #[arg(long, value_name = "UID")]
    user: Vec<u32>,
    /// File with the certificate of `grpc+tls://` addresses, in PEM format
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// File with its key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// CPUs of the server, as `0,2-5`
    #[arg(long, value_name = "CPUS")]
    cpus: Option<String>,
    /// Number added to the `nice` value of the server
    #[arg(long, value_name = "N")]
    nice: Option<u64>,
    #[command(flatten)]
    sets: Sets,
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let mut explicit = options.sets.sets.clone();
    explicit.extend(options.cpus.iter().map(|cpus| ("cpu_affinity".to_owned(), cpus.clone())));
    explicit.extend(options.nice.iter().map(|nice| ("thread_priority".to_owned(), nice.to_string())));
    if !options.paths.is_empty() {
        explicit.push(("data".to_owned(), settings::list_text(&options.paths)));
    }
    let resolved = settings::resolve(&explicit, context.env, Scope::All)?;
    for warning in &resolved.warnings {
        context.warn(warning)?;
    }
    let is_content = |name: &str| settings::find(name).is_some_and(|setting| setting.kind() == SettingKind::Content);
    let given =
        resolved.origins.iter().filter(|origin| !origin.origin.starts_with("default") && is_content(origin.name));
    let fixed = given.map(|origin| origin.name.to_owned()).collect();
    let mut config = resolved.config;
    let num_threads = resolved.origins.iter().find(|origin| origin.name == "num_threads");
    if num_threads.is_some_and(|origin| origin.origin.starts_with("default")) {
        // The server decides the threads of a stream.
        config.num_threads = None;
    }
    let also = options.also.iter().map(|text| {
        let mut data = forebay::Config::default();
        settings::find("data").expect("a setting").set(&mut data, text.as_str())?;
        Ok(data.data)
    });
    let options = server::Options {
        listen: options.listen.iter().map(|text| Address::parse(text)).collect::<Result<_, _>>()?,
        config,
        fixed,
        also: also.collect::<Result<_, Error>>()?,
        under: options.under.clone(),
        idle: Duration::from_secs(options.idle),
        users: options.user.clone(),
        token: Token::of(context.env)?,
        identity: options.tls_cert.clone().zip(options.tls_key.clone()),
    };
    for path in options.config.data.iter().chain(options.also.iter().flatten()).chain(&options.under) {
        let is_pattern = path.contains("://") || path.contains(['*', '?', '[']);
        if !is_pattern && !std::path::Path::new(path).exists() {
            context.warn(&format!("`{path}` does not exist: consumers that ask for it will be refused"))?;
        }
    }
    listen_to_signals();
    let mut written = Ok(());
    let ready = |addresses: &[Address]| {
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        written = writeln!(context.out, "ready at {}", addresses.join(" and ")).and_then(|()| context.out.flush());
    };
    server::serve(options, ready, || STOPPED.load(Ordering::Relaxed))?;
    written?;
    context.tell_notices()?;
    Ok(0)
}

/// Lets SIGTERM and Ctrl-C end the server in order.
fn listen_to_signals() {
    #[cfg(unix)]
    {
        extern "C" fn stop(_: libc::c_int) {
            STOPPED.store(true, Ordering::Relaxed);
        }
        for signal in [libc::SIGTERM, libc::SIGINT] {
            // SAFETY: the handler lives as long as the program, and only stores to an atomic.
            unsafe { libc::signal(signal, stop as extern "C" fn(libc::c_int) as libc::sighandler_t) };
        }
    }
}
