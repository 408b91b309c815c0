//! The sockets of a server, and who may connect.
//!
//! A Unix socket has the mode 0600. The server asks the system for the user of each peer, and
//! closes connections of users that the configuration does not name.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use arrow_flight::flight_service_server::FlightServiceServer;
use forebay::{Error, ErrorKind, Result};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Identity, Server, ServerTlsConfig};

use super::flight::Flight;
use super::{Address, Options};
use crate::access::{Asks, Token};
use crate::protocol::MOST_BYTES;

/// Largest message that a consumer may send, in bytes.
const MOST_RECEIVED: usize = 2 * MOST_BYTES;
/// Connections that wait to be served.
const WAITING: usize = 16;

enum Listener {
    Unix(UnixListener),
    /// A port, and whether it uses TLS.
    Tcp(TcpListener, bool),
}

/// The open sockets of a server.
pub(super) struct Listeners {
    addresses: Vec<Address>,
    /// Sockets of which the server has not begun to accept connections.
    sockets: std::sync::Mutex<Vec<Listener>>,
    /// Users that may connect to a Unix socket.
    users: Vec<u32>,
    files: Vec<SocketFile>,
    token: Option<Token>,
    identity: Option<Identity>,
    stop: watch::Sender<bool>,
}

impl Listeners {
    /// Opens the sockets of `options`.
    pub(super) async fn open(options: &Options) -> Result<Self> {
        if options.listen.is_empty() {
            return Err(Error::config("no address: name at least one by `--listen unix:PATH`"));
        }
        let (mut addresses, mut sockets, mut files) = (Vec::new(), Vec::new(), Vec::new());
        for address in &options.listen {
            let failed = |error: io::Error| Error::io(format!("cannot listen at `{address}`"), error);
            match address {
                Address::Unix(path) => {
                    let socket = bind_unix(path, !options.users.is_empty()).map_err(failed)?;
                    files.push(SocketFile::of(path).map_err(failed)?);
                    sockets.push(Listener::Unix(socket));
                    addresses.push(address.clone());
                }
                Address::Tcp { place, tls, .. } => {
                    if !address.is_local() && (!tls || options.token.is_none()) {
                        return Err(Error::config(format!(
                            "`{address}` is reached from other machines: it needs `grpc+tls://` and a token in \
                             `FOREBAY_SERVICE_TOKEN`"
                        )));
                    }
                    if *tls && options.identity.is_none() {
                        return Err(Error::config(format!("`{address}` needs `--tls-cert FILE` and `--tls-key FILE`")));
                    }
                    let socket = TcpListener::bind(place.as_str()).await.map_err(failed)?;
                    let place = socket.local_addr().map_err(failed)?.to_string();
                    sockets.push(Listener::Tcp(socket, *tls));
                    addresses.push(Address::Tcp { place, tls: *tls, ca: None });
                }
            }
        }
        // SAFETY: the call takes no argument and cannot fail.
        let own = unsafe { libc::geteuid() };
        let users = options.users.iter().copied().chain([own]).collect();
        let stop = watch::Sender::new(false);
        let identity = options.identity.as_ref().map(|(certificate, key)| identity(certificate, key)).transpose()?;
        let (sockets, token) = (std::sync::Mutex::new(sockets), options.token.clone());
        Ok(Self { addresses, sockets, users, files, token, identity, stop })
    }

    pub(super) fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Serves `flight` at all sockets until [`Listeners::stop`].
    pub(super) fn serve(&self, flight: Flight) -> Result<JoinHandle<Result<()>>> {
        let sockets = std::mem::take(&mut *super::data_sets::lock(&self.sockets));
        let mut servers = Vec::new();
        for socket in sockets {
            let service = FlightServiceServer::new(flight.clone()).max_decoding_message_size(MOST_RECEIVED);
            let mut server = Server::builder().max_frame_size(1_u32 << 20).tcp_nodelay(true);
            let stopped = stopped(self.stop.subscribe());
            servers.push(match socket {
                Listener::Unix(socket) => {
                    let connections = accept_unix(socket, self.users.clone());
                    tokio::spawn(server.add_service(service).serve_with_incoming_shutdown(connections, stopped))
                }
                Listener::Tcp(socket, tls) => {
                    let connections = accept_tcp(socket);
                    if let Some(identity) = self.identity.clone().filter(|_| tls) {
                        let config = ServerTlsConfig::new().identity(identity);
                        let refused =
                            |error| Error::config("the certificate or its key is unusable").with_source(error);
                        server = server.tls_config(config).map_err(refused)?;
                    }
                    let service = InterceptedService::new(service, Asks(self.token.clone()));
                    tokio::spawn(server.add_service(service).serve_with_incoming_shutdown(connections, stopped))
                }
            });
        }
        Ok(tokio::spawn(async move {
            for server in servers {
                match server.await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        return Err(Error::new(ErrorKind::Io, "the server failed").with_source(error));
                    }
                    Err(error) => return Err(Error::new(ErrorKind::Internal, "the server failed").with_source(error)),
                }
            }
            Ok(())
        }))
    }

    /// Accepts no more connections, and lets those that are open end.
    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
        for file in &self.files {
            file.remove();
        }
    }
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // The sender lives as long as the server.
    let _ = stop.wait_for(|is_stopped| *is_stopped).await;
}

fn accept_unix(socket: UnixListener, users: Vec<u32>) -> ReceiverStream<io::Result<UnixStream>> {
    let (sender, receiver) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        while !sender.is_closed() {
            let Ok((stream, _)) = socket.accept().await else {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            };
            let is_allowed = stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || users.contains(&peer.uid()));
            if is_allowed && sender.send(Ok(stream)).await.is_err() {
                break;
            }
        }
    });
    ReceiverStream::new(receiver)
}

fn accept_tcp(socket: TcpListener) -> ReceiverStream<io::Result<TcpStream>> {
    let (sender, receiver) = mpsc::channel(WAITING);
    tokio::spawn(async move {
        while !sender.is_closed() {
            let Ok((stream, _)) = socket.accept().await else {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            };
            // Small messages must not wait for more.
            let _ = stream.set_nodelay(true);
            if sender.send(Ok(stream)).await.is_err() {
                break;
            }
        }
    });
    ReceiverStream::new(receiver)
}

/// Binds a socket at `path`. Replaces the socket of a server that has ended. Other users may reach
/// it only if `is_shared`.
fn bind_unix(path: &Path, is_shared: bool) -> io::Result<UnixListener> {
    if let Ok(found) = fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "another file has this path"));
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another server listens there"));
        }
    }
    // The socket gets its path once its mode is right.
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    let new = path.with_file_name(name);
    let _ = fs::remove_file(&new);
    let socket = UnixListener::bind(&new)?;
    let mode = if is_shared { 0o666 } else { 0o600 };
    let placed = fs::set_permissions(&new, fs::Permissions::from_mode(mode)).and_then(|()| fs::rename(&new, path));
    if let Err(error) = placed {
        let _ = fs::remove_file(&new);
        return Err(error);
    }
    Ok(socket)
}

/// The certificate of a server and its key, from files in PEM format.
fn identity(certificate: &Path, key: &Path) -> Result<Identity> {
    let read =
        |path: &Path| fs::read(path).map_err(|error| Error::io("cannot read a file of the server", error).at(path));
    Ok(Identity::from_pem(read(certificate)?, read(key)?))
}

/// The file of a socket, as this server made it.
struct SocketFile {
    path: PathBuf,
    file: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), file: (found.dev(), found.ino()) })
    }

    /// Removes the file, unless another server has replaced it.
    fn remove(&self) {
        if Self::of(&self.path).is_ok_and(|now| now.file == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
