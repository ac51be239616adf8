//! Runs the built host, with the plugins built beside it, in a directory of its own. Whatever happens, nothing waits longer
//! than [`PATIENCE`], and a test that fails shows what the host and the guest said.

// Each test file uses a part of it.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The longest that anything here may take; hundreds of times what it does take.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The host's own program, or that of the crate which runs these tests' scenes on another hypervisor.
const HOST: &str = match option_env!("CARGO_BIN_EXE_vmm-host") {
    Some(host) => host,
    None => match option_env!("CARGO_BIN_EXE_vmm-host-emulated") {
        Some(host) => host,
        None => panic!("there is no program to test"),
    },
};
const PLUGINS: [&str; 8] = [
    "uart",
    "console",
    "virtio-block",
    "file",
    "memory",
    "pvpanic",
    "cloudinit",
    "overlay",
];

/// Whether guests can run here. If not, says that `test` is skipped and why.
pub fn kvm(test: &str) -> bool {
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    match opened {
        Ok(_) => true,
        Err(error) => {
            println!("SKIPPED: {test}: /dev/kvm: {error}");
            false
        }
    }
}

/// Builds the plugins once per test program, to where the host's own binary is: it looks for them there.
fn build_plugins() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let beside = Path::new(HOST).parent().unwrap();
        let profile = match beside.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => "dev",
            Some(name) => name,
        };
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--profile", profile]);
        cargo.arg("--target-dir").arg(beside.parent().unwrap());
        for plugin in PLUGINS {
            cargo.args(["-p", &format!("vmm-plugin-{plugin}")]);
        }
        let built = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status();
        assert!(built.unwrap().success(), "the plugins can't be built");
    });
}

/// A VM file: `[main]` for the self-test guest with `cmdline` and the lines of `main`, then `rest`.
pub fn vm(cmdline: &str, main: &str, rest: &str) -> String {
    let mut text = String::from("[main]\nname = \"test\"\n");
    for (key, value) in [
        ("cpus", "1"),
        ("memory", "64"),
        ("kernel", "\"builtin:selftest\""),
    ] {
        let given = main
            .lines()
            .any(|line| line.split('=').next().is_some_and(|k| k.trim() == key));
        if !given {
            text += &format!("{key} = {value}\n");
        }
    }
    text += &format!("cmdline = \"{cmdline}\"\n{main}\n{rest}\n");
    text
}

/// The first serial port on standard input and output.
pub const STDIO: &str = "[char_dev.ttya]\ntype = \"stdio\"\n";

/// [`STDIO`], and a virtio disk on the backend that the lines of `backend` describe.
pub fn disk(backend: &str) -> String {
    format!(
        "{STDIO}[dev.block0]\ndriver = \"pci-virtio-block\"\npci-path = \"0.4.0\"\nblock_dev = \"disk\"\n\
         [block_dev.disk]\n{backend}\n"
    )
}

/// An ELF kernel of `code`, to be entered in 64-bit mode at 2 MiB.
pub fn elf(code: &[u8]) -> Vec<u8> {
    const ADDRESS: u64 = 2 << 20;
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    out.resize(16, 0);
    // ET_EXEC, EM_X86_64
    out.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [ADDRESS, 0x40, 0] {
        out.extend(word.to_le_bytes());
    }
    // Flags; sizes and numbers of the headers.
    out.extend([0, 0, 0, 0, 0x40, 0, 0x38, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // PT_LOAD, read, write, execute.
    out.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let len = code.len() as u64;
    for word in [0x78, ADDRESS, ADDRESS, len, len, 0x1000] {
        out.extend(word.to_le_bytes());
    }
    out.extend(code);
    out
}

/// A directory to run VMs in.
pub struct Scene {
    directory: Arc<TempDir>,
}

impl Scene {
    /// An empty one.
    pub fn new() -> Self {
        build_plugins();
        Self {
            directory: Arc::new(TempDir::new().unwrap()),
        }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes a file.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// Makes an empty image of `bytes`.
    pub fn image(&self, name: &str, bytes: u64) {
        let file = std::fs::File::create(self.path(name)).unwrap();
        file.set_len(bytes).unwrap();
    }

    /// Names of all files in it but VM files.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.ends_with(".toml"))
            .collect();
        names.sort();
        names
    }

    /// Starts the host with this VM file.
    pub fn start(&self, vm: &str) -> Running {
        self.start_with(Command::new(HOST), vm, &[])
    }

    /// Starts the host with this VM file and these arguments. `command` runs the host: itself, or a program that ends by
    /// executing what its arguments say.
    pub fn start_with(&self, mut command: Command, vm: &str, arguments: &[&str]) -> Running {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("vm{number}.toml");
        self.write(&name, vm);
        command
            .args(arguments)
            .arg(&name)
            .current_dir(self.directory.path())
            .env_remove("RUST_LOG")
            .env_remove("VMM_PLUGIN_PATH")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Running {
            input: child.stdin.take(),
            out: Stream::of(child.stdout.take().unwrap()),
            err: Stream::of(child.stderr.take().unwrap()),
            child,
            _directory: self.directory.clone(),
        }
    }

    /// Runs a VM to its end.
    pub fn run(&self, vm: &str) -> Ran {
        self.start(vm).wait()
    }

    /// A client of the socket `name`, which has to be there already: a moment later it listens.
    pub fn connect(&self, name: &str) -> UnixStream {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(self.path(name)) {
                Ok(stream) => break stream,
                Err(error) if start.elapsed() > PATIENCE => panic!("{name}: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

/// The host's program, for [`Scene::start_with`].
pub fn host() -> Command {
    Command::new(HOST)
}

/// The host's program as the last thing that `sh -c script` executes: the script ends in `exec "$@"`.
pub fn host_by(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", HOST]);
    command
}

/// The host's program as the last thing that `script` executes in a mount namespace of its own, where it may mount. `None`, and
/// says that `test` is skipped, where that is not allowed.
pub fn host_by_mounting(test: &str, script: &str) -> Option<Command> {
    for flags in ["--mount", "-rm"] {
        let tried = Command::new("unshare")
            .args([flags, "mount", "-t", "tmpfs", "none", "/mnt"])
            .output();
        if tried.is_ok_and(|ran| ran.status.success()) {
            let mut command = Command::new("unshare");
            command.args([flags, "sh", "-c", script, "sh", HOST]);
            return Some(command);
        }
    }
    println!("SKIPPED: {test}: no mount namespaces for this user");
    None
}

/// Everything that a pipe has delivered so far.
struct Stream(Arc<(Mutex<Text>, Condvar)>);

#[derive(Default)]
struct Text {
    bytes: Vec<u8>,
    ended: bool,
}

impl Stream {
    fn of(mut from: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(Text::default()), Condvar::new()));
        let own = shared.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 1 << 16];
            loop {
                let len = from.read(&mut buffer).unwrap_or(0);
                let mut text = own.0.lock().unwrap();
                text.bytes.extend(&buffer[..len]);
                text.ended = len == 0;
                own.1.notify_all();
                if len == 0 {
                    return;
                }
            }
        });
        Self(shared)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap().bytes).into_owned()
    }

    /// Waits until `found` likes the text. False: it has ended, or that took too long.
    fn wait(&self, mut found: impl FnMut(&str) -> bool) -> bool {
        let end = Instant::now() + PATIENCE;
        let mut text = self.0.0.lock().unwrap();
        loop {
            if found(&String::from_utf8_lossy(&text.bytes)) {
                return true;
            }
            let left = end.saturating_duration_since(Instant::now());
            if text.ended || left.is_zero() {
                return false;
            }
            text = self.0.1.wait_timeout(text, left).unwrap().0;
        }
    }
}

/// A host that runs. Killed when dropped.
pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    out: Stream,
    err: Stream,
    /// It lasts as long as this.
    _directory: Arc<TempDir>,
}

impl Running {
    /// The host's process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its standard input.
    pub fn write(&mut self, bytes: &[u8]) {
        self.input.as_mut().unwrap().write_all(bytes).unwrap();
    }

    /// Closes its standard input.
    pub fn end_input(&mut self) {
        self.input = None;
    }

    fn both(&self) -> String {
        let (out, err) = (self.out.text(), self.err.text());
        format!("--- stdout\n{out}\n--- stderr\n{err}")
    }

    /// Waits for standard output, where the guest's console is, to contain `text`, at least `times` times.
    pub fn expect_times(&self, text: &str, times: usize) {
        let found = self.out.wait(|out| out.matches(text).count() >= times);
        assert!(found, "no {text:?} {times} times\n{}", self.both());
    }

    /// Waits for standard output, where the guest's console is, to contain `text`.
    pub fn expect(&self, text: &str) {
        self.expect_times(text, 1);
    }

    /// Waits for the log to contain `text`.
    pub fn expect_log(&self, text: &str) {
        let found = self.err.wait(|err| err.contains(text));
        assert!(found, "no {text:?} in the log\n{}", self.both());
    }

    /// Whether standard output contains `text` by now.
    pub fn said(&self, text: &str) -> bool {
        self.out.text().contains(text)
    }

    /// The log so far.
    pub fn log(&self) -> String {
        self.err.text()
    }

    /// Waits for `done`.
    pub fn until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < end, "{what}: not in time\n{}", self.both());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Sends the host a signal.
    pub fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(id).unwrap(), signal).unwrap();
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ran {
        let end = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() >= end => {
                    panic!("the host does not end\n{}", self.both())
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        self.out.wait(|_| false);
        self.err.wait(|_| false);
        Ran {
            status,
            out: self.out.text(),
            err: self.err.text(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What came of a run.
pub struct Ran {
    /// How the process ended.
    pub status: ExitStatus,
    /// Standard output: the guest's console, unless its VM file says otherwise.
    pub out: String,
    /// Standard error: the host's log.
    pub err: String,
}

impl Ran {
    /// Checks how the process ended, and that nothing panicked on the way.
    #[track_caller]
    pub fn exited(self, code: i32) -> Self {
        assert_eq!(
            (self.status.code(), self.status.signal()),
            (Some(code), None),
            "{self}"
        );
        // As Rust puts it; of a guest the log may say the same.
        assert!(!self.err.contains("panicked at"), "{self}");
        self
    }

    /// Checks that the guest has said `text`.
    #[track_caller]
    pub fn said(self, text: &str) -> Self {
        assert!(self.out.contains(text), "no {text:?}\n{self}");
        self
    }

    /// Checks that the log contains `text`.
    #[track_caller]
    pub fn logged(self, text: &str) -> Self {
        assert!(self.err.contains(text), "no {text:?} in the log\n{self}");
        self
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            to,
            "{}\n--- stdout\n{}\n--- stderr\n{}",
            self.status, self.out, self.err
        )
    }
}
