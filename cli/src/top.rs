//! `forebay top`: shows the status of loaders in other processes, as their `FOREBAY_METRICS` tells
//! it.

use std::io::{IsTerminal, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use forebay::Error;
use serde_json::Value;

use crate::{Context, FAILED, Failure};

/// Longest wait for one process.
const LIMIT: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
#[command(after_help = "Example: forebay top 127.0.0.1:9440 127.0.0.1:9441")]
pub(crate) struct Options {
    /// Addresses that `FOREBAY_METRICS` gave to the processes
    #[arg(required = true)]
    addresses: Vec<String>,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    every: f64,
    /// Looks once
    #[arg(long)]
    once: bool,
}

pub(crate) fn run(options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    if !(options.every > 0.0 && options.every <= 86_400.0) {
        return Err(Error::config(format!("`--every` must be seconds up to 86400, found {}", options.every)).into());
    }
    let clears = std::io::stdout().is_terminal() && !options.once;
    loop {
        let found: Vec<Result<Value, String>> = options.addresses.iter().map(|address| status(address)).collect();
        let mut text = String::new();
        for (address, found) in options.addresses.iter().zip(&found) {
            match found {
                Ok(status) => text.push_str(&table(address, status)),
                Err(fault) => text.push_str(&format!("{address}: {fault}\n")),
            }
        }
        if clears {
            // Moves to the first line and clears the screen.
            write!(context.out, "\x1b[H\x1b[2J")?;
        }
        write!(context.out, "{text}")?;
        context.out.flush()?;
        if options.once {
            return Ok(if found.iter().all(Result::is_err) { FAILED } else { 0 });
        }
        std::thread::sleep(Duration::from_secs_f64(options.every));
    }
}

/// The status of the process at `address`, or what went wrong.
fn status(address: &str) -> Result<Value, String> {
    let ask = || -> std::io::Result<Vec<u8>> {
        let place = address.to_socket_addrs()?.next().ok_or(std::io::ErrorKind::NotFound)?;
        let mut stream = TcpStream::connect_timeout(&place, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(format!("GET /status HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").as_bytes())?;
        let mut answer = Vec::new();
        stream.take(16 << 20).read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().map_err(|error| format!("no answer: {error}"))?;
    let body = answer.windows(4).position(|end| end == b"\r\n\r\n").map(|at| &answer[at + 4..]);
    let status = body.and_then(|body| serde_json::from_slice(body).ok());
    status.ok_or_else(|| "no forebay answers there".to_owned())
}

/// The loaders of a process, the rank that waits most first.
fn table(address: &str, status: &Value) -> String {
    let number = |value: &Value, key: &str| value[key].as_f64().unwrap_or(0.0);
    let mut loaders: Vec<&Value> = status["loaders"].as_array().into_iter().flatten().collect();
    loaders.sort_by(|one, other| number(other, "wait_share").total_cmp(&number(one, "wait_share")));
    let mut text = format!("{address}: process {}, {} loaders\n", status["process"], loaders.len());
    if let Some(slowest) = loaders.first() {
        text.push_str(&format!("  {}\n", slowest["verdict"].as_str().unwrap_or_default()));
        text.push_str("  rank  epoch          step   Mtok/s  waited  left\n");
    }
    for loader in loaders {
        let steps = loader["steps"].as_u64().map_or_else(|| "no end".to_owned(), |steps| steps.to_string());
        let left = loader["seconds_left"].as_f64().map_or_else(|| "-".to_owned(), |left| format!("{left:.0} s"));
        text.push_str(&format!(
            "  {:>4}  {:>5}  {:>12}  {:>7.2}  {:>4.1} %  {left}\n",
            loader["rank"].as_u64().unwrap_or(0),
            loader["epoch"].as_u64().unwrap_or(0),
            format!("{}/{steps}", loader["step"].as_u64().unwrap_or(0)),
            number(loader, "tokens_per_second") / 1e6,
            number(loader, "wait_share") * 100.0,
        ));
    }
    text
}
