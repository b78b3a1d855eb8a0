import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.nio.file.attribute.PosixFilePermissions;
import java.util.*;
import java.util.stream.Stream;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;

/** A source that cannot tell must never count as "nobody is connected", in whatever way it fails. */
class BrokenToolsTest {

    /** The tables that stubs print are about this port. Nothing uses it really, so real sources see nothing of it. */
    private static final int PORT = 1;
    private static final String PEER = "10.9.8.7:4711";
    private static final String SOCKET = "prestop-stub.sock";
    private static final String LEAVES = "All build processes seem to have stopped";
    private static final String NO_ANSWER = "no answer in 5 s";

    @TempDir
    private Path directory;

    // ---- Tools -----------------------------------------------------------------------------------------------------

    /** How each tool writes what a stub says for it. */
    enum Tool {
        netstat("Active Internet connections (servers and established)\n"
                + "Proto Recv-Q Send-Q Local Address           Foreign Address         State      ",
                "tcp6       0      0 :::%d                   :::*                    LISTEN     ",
                "tcp        0      0 127.0.0.1:%d            %s           ESTABLISHED",
                "Active UNIX domain sockets (servers and established)\n"
                + "Proto RefCnt Flags       Type       State         I-Node   Path",
                "unix  2      [ ACC ]     STREAM     LISTENING     4710     /run/stub/prestop-stub.sock",
                "unix  3      [ ]         STREAM     CONNECTED     4711     /run/stub/prestop-stub.sock"),
        ss("Netid State     Recv-Q Send-Q Local Address:Port Peer Address:Port Process",
                "tcp   LISTEN    0      4096               *:%d             *:*          ",
                "tcp   ESTAB     0      0          127.0.0.1:%d            %s          ", "",
                "u_str LISTEN    0      0      /run/stub/prestop-stub.sock 4710 * 0",
                "u_str ESTAB     0      0      /run/stub/prestop-stub.sock 4711 * 4712");

        private final String heading, listener, connection, unixHeading, unixListener, unixConnection;

        Tool(String heading, String listener, String connection, String unixHeading, String unixListener,
                String unixConnection) {
            this.heading = heading;
            this.listener = listener;
            this.connection = connection;
            this.unixHeading = unixHeading;
            this.unixListener = unixListener;
            this.unixConnection = unixConnection;
        }

        /** A script that prints both tables, with these rows of TCP and of unix sockets. */
        String tables(String tcpRows, String unixRows) {
            return print(heading) + tcpRows + (unixHeading.isEmpty() ? "" : print(unixHeading)) + unixRows;
        }

        String quiet(int port) { return tables(print(listener.formatted(port)), print(unixListener)); }

        String busy(int port) {
            return tables(print(listener.formatted(port)) + print(connection.formatted(port, PEER)),
                    print(unixListener));
        }

        String busyOnUnix(int port) {
            return tables(print(listener.formatted(port)), print(unixListener) + print(unixConnection));
        }
    }

    /** A shell's line that prints the text as a line. */
    private static String print(String line) { return "printf '%s\\n' '" + line + "'\n"; }

    /**
     * One way to fail: what the stub does, and what the warning must say about it. No script: there is no such
     * command. No reason: it is not worth a warning where another source works.
     */
    record Fault(Tool tool, String name, String script, String reason) {
        void install(Path directory) throws IOException {
            Path file = directory.resolve(tool.name());
            if (script != null && script.startsWith("#!")) {
                Files.writeString(file, script);
                Files.setPosixFilePermissions(file, PosixFilePermissions.fromString("rwxr-xr-x"));
            } else if (script != null) {
                // each stub leaves its process id, and DIR names the place for those of its children
                Tools.stub(file, "DIR='" + directory + "'\necho $$ >> \"$DIR/pids\"\n"
                        // it inherits the hook's PATH, which has nothing but the stub
                        + "PATH=/usr/sbin:/usr/bin:/sbin:/bin\n" + script);
            }
            if (name.equals("may not be run")) {
                Files.setPosixFilePermissions(file, PosixFilePermissions.fromString("rw-r--r--"));
            }
        }

        @Override public String toString() { return tool + " " + name; }
    }

    static Stream<Fault> faults() {
        // These use up a core for 5 s each, so each is of one tool only.
        Stream<Fault> endless = Stream.of(
                new Fault(Tool.netstat, "prints a line without end",
                        Tool.netstat.quiet(PORT) + "while :; do printf xxxxxxxxxxxxxxxx; done", NO_ANSWER),
                new Fault(Tool.ss, "prints rows without end", Tool.ss.quiet(PORT) + "while :; do "
                        + print(Tool.ss.listener.formatted(PORT)) + "done", NO_ANSWER));
        return Stream.concat(Stream.of(Tool.values()).flatMap(BrokenToolsTest::faults), endless);
    }

    private static Stream<Fault> faults(Tool tool) {
        // A hook that believed the table would leave, because all of these say that nobody is connected.
        String table = tool.quiet(PORT);
        String listener = print(tool.listener.formatted(PORT));
        String noTable = "not a socket table";
        return Stream.of(
                new Fault(tool, "is missing", null, null),
                new Fault(tool, "may not be run", table, null),
                new Fault(tool, "cannot be started", "#!/no/such/interpreter", "Cannot run program"),
                new Fault(tool, "fails and prints nothing", "exit 1", "exit status 1, " + noTable),
                new Fault(tool, "fails beside a table", table + "exit 1", "exit status 1."),
                new Fault(tool, "is killed beside a table", table + "kill -9 $$", "exit status 137"),
                new Fault(tool, "does not know its options", "echo 'Usage: x [-y]' >&2", "Usage: x [-y]"),
                new Fault(tool, "prints nothing", "exit 0", noTable),
                new Fault(tool, "fails with a complaint", "echo 'cannot open netlink socket' >&2; exit 2",
                        "exit status 2, not a socket table: cannot open netlink socket"),
                new Fault(tool, "prints garbage", "printf '\\001\\377\\0\\n\\n\\n'", noTable),
                new Fault(tool, "prints half a table", table + half(tool.listener, 20), noTable),
                new Fault(tool, "prints half a row of a unix socket", table + half(tool.unixConnection, 40), noTable),
                new Fault(tool, "prints half a heading", half(tool.heading, 20), noTable),
                new Fault(tool, "leaves out the unix sockets", (print(tool.heading) + listener)
                        .replace("Netid ", "").replace("tcp   LISTEN", "LISTEN"), noTable),
                new Fault(tool, "prints an unknown row of a unix socket", table + print(tool.unixConnection
                        .replace("ESTAB", "?").replace("CONNECTED", "?")), noTable),
                new Fault(tool, "prints rows without a heading", listener, noTable),
                new Fault(tool, "complains beside a table", table + "echo 'no support for AF INET6' >&2",
                        "no support for AF INET6"),
                new Fault(tool, "says that there is no IPv6 though there is", table
                        + "echo 'netstat: /proc/net/tcp6: No such file or directory' >&2",
                        "not a socket table: netstat: /proc/net/tcp6"),
                new Fault(tool, "hangs", "exec sleep 1000", NO_ANSWER),
                new Fault(tool, "hangs after its table, and children too, which hold the pipe open", table
                        + "sleep 1000 & echo $! >> \"$DIR/pids\"\n"
                        + "sh -c 'echo $$ >> \"$1/pids\"; sleep 1000 & echo $! >> \"$1/pids\"; wait' sh \"$DIR\" &\n"
                        + "wait", NO_ANSWER));
    }

    private static String half(String line, int length) { return "printf '" + line.substring(0, length) + "'"; }

    @ParameterizedTest
    @MethodSource("faults")
    void theNextSourceIsAskedWhenATool(Fault fault) throws IOException {
        fault.install(directory);
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.start(withoutSocket(environment(server.port(), "auto")))) {
            hook.awaitLog("1 connection to port " + server.port() + " from 127.0.0.1:"
                    + build.client().getLocalPort());
            hook.awaitChecks("1", 10);
            assertNoneOfThePidsRuns();
            assertThat(hook.process().isAlive()).isTrue();
            if (fault.reason == null) {
                assertThat(hook.messages("warning")).isEmpty();
            } else {
                assertThat(hook.messages("warning")).singleElement().asString()
                        .contains("Could not use " + fault.tool + ": ").contains(fault.reason);
            }
            build.close();
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("info")).last().asString().contains(LEAVES);
        } finally {
            endThePids();
        }
    }

    /** For a test in which nothing listens on the stubs' socket. */
    private static Map<String, String> withoutSocket(Map<String, String> env) {
        env.remove("BUILDKITD_SOCKET");
        return env;
    }

    /** In rows of what the hook watches; in other rows they are no fault. */
    static Stream<Fault> statesThatThereAreNot() {
        return Stream.of(Tool.values()).flatMap(tool -> Stream.of(
                new Fault(tool, "shows such a state", tool.busy(PORT).replace("ESTABLISHED", "VERBUNDEN")
                        .replace("tcp   ESTAB", "tcp   E"), "not a socket table: tcp "),
                new Fault(tool, "shows such a state of our unix socket", tool.busyOnUnix(PORT)
                        .replace("CONNECTED", "VERBUNDEN").replace("u_str ESTAB", "u_str E"),
                        "not a socket table: u")));
    }

    @ParameterizedTest
    @MethodSource({"faults", "statesThatThereAreNot"})
    void theHookStaysUntilItCanTellWhenTheOnlyTool(Fault fault) throws IOException {
        fault.install(directory);
        try (Hook hook = hook(PORT, fault.tool.name())) {
            hook.awaitChecks("unknown", NO_ANSWER.equals(fault.reason) ? 1 : 5);
            hook.awaitLog("Cannot tell");
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(hook.messages("warning")).singleElement().asString()
                    .contains("Cannot tell whether clients are connected to port " + PORT + " or " + SOCKET + ": ")
                    .contains(fault.reason == null ? fault.tool + ": not on the PATH" : fault.reason);

            Tools.stub(directory.resolve(fault.tool.name()), fault.tool.busy(PORT));
            hook.awaitLog("1 connection to port " + PORT + " from " + PEER + " and 0 to " + SOCKET);
            assertNoneOfThePidsRuns();
            Tools.stub(directory.resolve(fault.tool.name()), fault.tool.busyOnUnix(PORT));
            hook.awaitLog("0 connections to port " + PORT + " and 1 to " + SOCKET);
            Tools.stub(directory.resolve(fault.tool.name()), fault.tool.quiet(PORT));
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("info")).last().asString().contains(LEAVES);
            assertThat(hook.messages("warning")).hasSize(1);
        } finally {
            endThePids();
        }
    }

    /** What a tool shows that sees half: all of it whole tables, and none of them shows a connection. */
    enum Half {
        headings, listeners, otherStates, otherPort;

        String of(Tool tool, int port) {
            String listeners = print(tool.listener.formatted(port));
            String other = print(tool.connection.formatted(port, PEER).replace("ESTABLISHED", "TIME_WAIT")
                    .replace("ESTAB ", "TIME-WAIT "));
            return switch (this) {
                case headings -> tool.tables("", "");
                case listeners -> tool.quiet(port);
                case otherStates -> tool.tables(listeners + other, print(tool.unixListener));
                case otherPort -> tool.tables(listeners + print(tool.connection.formatted(9, PEER)), "");
            };
        }
    }

    static Stream<Arguments> halves() {
        return Stream.of(Tool.values()).flatMap(tool -> Stream.of(Half.values()).map(half -> Arguments.of(tool, half)));
    }

    /** The client comes by IPv4, by IPv6 and over the unix socket. */
    @ParameterizedTest
    @MethodSource("halves")
    void aToolThatSeesHalfIsNotBelievedThatNobodyIsConnected(Tool tool, Half half) throws Exception {
        Path socket = directory.resolve("b.sock");
        try (Server server = Server.start(); Server.OnSocket unix = new Server.OnSocket(socket)) {
            Tools.stub(directory.resolve(tool.name()), half.of(tool, server.port()));
            Map<String, String> env = environment(server.port(), "auto");
            env.put("BUILDKITD_SOCKET", socket.toString());
            AutoCloseable build = server.connect();
            try (Hook hook = Hook.start(env)) {
                hook.awaitChecks("1", 10);
                AutoCloseable next = unix.connect();
                build.close();
                hook.awaitLog("0 connections to port " + server.port() + " and 1 to " + socket);
                hook.awaitChecks("1", Collections.frequency(hook.checks(), "1") + 10);
                assertThat(hook.process().isAlive()).isTrue();
                next.close();
                assertThat(hook.exitCode()).isZero();
                assertThat(hook.messages("warning")).isEmpty();
            }
        }
    }

    /** It cannot make a look quiet, and to start it is dear. */
    @Test
    void aToolIsAskedAtTheBeginningOfTheQuietTimeAndIsBelievedAtItsEnd() throws IOException {
        Path asked = directory.resolve("asked");
        try (Server server = Server.start()) {
            String quiet = Tool.netstat.quiet(server.port());
            Tools.stub(directory.resolve("netstat"), "if [ -e '" + asked + "' ]; then\n"
                    + Tool.netstat.busy(server.port()) + "else\n: >'" + asked + "'\n" + quiet + "fi\n");
            Map<String, String> env = withoutSocket(environment(server.port(), "auto"));
            env.put("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "1");
            try (Hook hook = Hook.start(env)) {
                hook.awaitChecks("1", 3);
                List<String> checks = hook.checks();
                assertThat(checks.indexOf("1")).as("quiet checks by the kernel's word").isGreaterThanOrEqualTo(49);
                assertThat(checks.subList(checks.indexOf("1"), checks.size())).containsOnly("1");
                Tools.stub(directory.resolve("netstat"), "echo >>'" + asked + "'\n" + quiet);
                assertThat(hook.exitCode()).isZero();
                assertThat(Files.readAllLines(asked)).hasSizeBetween(2, 4);
            }
        }
    }

    @Test
    void whereNobodyListensByTheKernelsTablesItCannotTellWhateverAToolShows() {
        Tools.stub(directory.resolve("netstat"), Tool.netstat.quiet(PORT));
        try (Hook hook = hook(PORT, "auto")) {
            hook.awaitChecks("unknown", 10);
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(hook.messages("warning")).singleElement().asString()
                    .contains(": nothing listens on port " + PORT + " or " + SOCKET + ".");
        }
    }

    @Test
    void ssIsAskedWhenNetstatFailsAndNetstatWhenSsFails() {
        Tools.stub(directory.resolve("netstat"), "exit 1");
        Tools.stub(directory.resolve("ss"), Tool.ss.busy(PORT));
        try (Hook hook = hook(PORT, "auto")) {
            hook.awaitChecks("1", 3);
            Tools.stub(directory.resolve("netstat"), Tool.netstat.busy(PORT).replace(PEER, "10.9.8.7:5"));
            Tools.stub(directory.resolve("ss"), "exit 1");
            hook.awaitLog("Could not use ss: ");
            int checks = Collections.frequency(hook.checks(), "1");
            hook.awaitChecks("1", checks + 3);
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(hook.messages("warning")).hasSize(2);
        }
    }

    @Test
    void aChildThatOutlivesItsToolAndHoldsThePipeOpenIsNotWaitedFor() throws IOException {
        Tools.stub(directory.resolve("netstat"), Tool.netstat.busy(PORT)
                + "PATH=/usr/bin:/bin\nsleep 1000 & echo $! >> '" + directory + "/pids'");
        Map<String, String> env = environment(PORT, "netstat");
        env.put("CHECK_FREQUENCY_MS", "1000000"); // so there is one child, and the file names it
        try (Hook hook = Hook.start(env)) {
            hook.awaitChecks("1", 1);
            assertThat(hook.messages("warning")).isEmpty(); // so the 5 s were not used up
        } finally {
            endThePids();
        }
    }

    @Test
    void theQuietCountStartsFromZeroAfterATimeInWhichNoSourceWorked() {
        // with one source, so that no real socket of this machine can answer
        Tools.stub(directory.resolve("ss"), Tool.ss.quiet(PORT));
        Map<String, String> env = environment(PORT, "ss");
        env.put("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "1");
        try (Hook hook = Hook.start(env)) {
            hook.awaitChecks("0", 20);
            Tools.stub(directory.resolve("ss"), "exit 1");
            hook.awaitChecks("unknown", 3);
            Tools.stub(directory.resolve("ss"), Tool.ss.quiet(PORT));
            assertThat(hook.exitCode()).isZero();
            List<String> checks = hook.checks();
            assertThat(checks.size() - 1 - checks.lastIndexOf("unknown")).isBetween(1000 / 20, 1000 / 20 + 1);
        }
    }

    @Test
    void theHookGivesUpInTimeThoughItCouldNeverTell() {
        Map<String, String> env = environment(PORT, "netstat");
        env.put("MAX_WAIT_SECONDS", "1");
        try (Hook hook = Hook.start(env)) {
            assertThat(hook.exitCode()).isEqualTo(124);
            assertThat(hook.messages("warning")).last().asString()
                    .contains("Giving up").contains("Cannot tell").contains("netstat: not on the PATH");
        }
    }

    @Test
    void anErrorThatNobodyThoughtOfIsALookThatFailed() {
        BuildkitPrestop settings = new BuildkitPrestop();
        settings.socket = SOCKET;
        settings.source = BuildkitPrestop.ConnectionSource.procfs;
        Sockets sockets = new Sockets(settings) {
            @Override
            Look newLook(Source source) { throw new StackOverflowError(); }
        };
        assertThatThrownBy(sockets::askAll).isInstanceOf(IOException.class)
                .hasMessage("procfs: java.lang.StackOverflowError");
    }

    @Test
    void onceSaysOnStderrWhyItCannotTellAndPrintsNoNumber() {
        try (Hook hook = Hook.start(environment(PORT, "ss"), "--once")) {
            assertThat(hook.exitCode()).isEqualTo(1);
            assertThat(hook.out()).isEmpty();
            assertThat(hook.messages("warning")).singleElement().asString().contains("ss: not on the PATH");
        }
    }

    @ParameterizedTest
    @ValueSource(booleans = {false, true})
    void aMissingToolIsNotStartedOnEveryCheck(boolean there) throws IOException {
        if (there) {
            Tools.stub(directory.resolve("netstat"), Tool.netstat.busy(PORT));
        }
        try (Hook hook = hook(PORT, there ? "netstat" : "ss")) {
            hook.awaitChecks(there ? "1" : "unknown", 20);
            // Field 11 of proc(5)'s stat: page faults of children that have ended. Even a vain attempt to start one
            // has some.
            String stat = Files.readString(Path.of("/proc", "" + hook.process().pid(), "stat"));
            long faults = Long.parseLong(stat.substring(stat.lastIndexOf(')') + 2).split(" ")[8]);
            assertThat(faults > 0).isEqualTo(there);
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"real netstat", "real ss", "failing netstat", "chatty ss", "unstartable netstat"})
    void neitherZombiesNorOpenFilesPileUpWith(String what) throws IOException {
        String tool = what.endsWith("netstat") ? "netstat" : "ss";
        if (what.startsWith("real")) {
            Tools.only(directory, Map.of(tool, Tools.require(tool)));
        } else {
            String script = switch (what.split(" ")[0]) {
                case "unstartable" -> "#!/no/such/interpreter";
                case "failing" -> "exit 1";
                default -> "echo garbage; echo garbage";
            };
            new Fault(Tool.valueOf(tool), what, script, null).install(directory);
        }
        try (Server server = Server.start(); Server.Connection build = server.connect()) {
            Map<String, String> env = environment(server.port(), tool);
            env.put("CHECK_FREQUENCY_MS", "1");
            try (Hook hook = Hook.start(env)) {
                String count = what.startsWith("real") ? "1" : "unknown";
                hook.awaitChecks(count, 50);
                int filesBefore = openFiles(hook);
                hook.awaitChecks(count, 200);
                // while a tool is being started there are some more for a moment
                Hook.waitUntil("about " + filesBefore + " files are open", () -> openFiles(hook) <= filesBefore + 3);
                List<ProcessHandle> children = hook.process().children().toList();
                assertThat(children).hasSizeLessThan(5);
                Hook.waitUntil("the children are gone",
                        () -> children.stream().noneMatch(child -> Files.exists(Path.of("/proc", "" + child.pid()))));
            }
        }
    }

    // ---- procfs ----------------------------------------------------------------------------------------------------

    private static final String PROCFS_HEADING = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when"
            + " retrnsmt   uid  timeout inode                                                     \n";
    private static final String PROCFS_UNIX_HEADING = "Num       RefCount Protocol Flags    Type St Inode Path\n";
    private static final String PROCFS_UNIX_CONNECTION =
            "0000000000000000: 00000003 00000000 00000000 0001 03  4711 /run/stub/prestop-stub.sock\n";
    private static final String PROCFS_UNIX_LISTENER =
            "0000000000000000: 00000002 00000000 00010000 0001 01  4710 /run/stub/prestop-stub.sock\n";
    private static final String PROCFS_LISTENER = procfsRow("00000000:0001 00000000:0000 0A");
    private static final String PROCFS_CONNECTION = procfsRow("0100007F:0001 0708090A:1267 01");

    private static String procfsRow(String sockets) {
        return "   0: " + sockets + " 00000000:00000000 00:00000000 00000000     0        0 4711 1 0000000000000000"
                + " 100 0 0 10 0\n";
    }

    /** Wraps a command: its own /proc/net, not that of its children, is the directory. */
    private static List<String> withProcNet(Path net, List<String> command) {
        List<String> wrapped = new ArrayList<>(List.of(Tools.require("unshare").toString(), "--mount", "/bin/sh", "-c",
                bind("$0") + " && exec \"$@\"", net.toString()));
        wrapped.addAll(command);
        return wrapped;
    }

    /** A shell's command that gives it, and what it executes, such a /proc/net. */
    private static String bind(String net) {
        return "PATH=/usr/sbin:/usr/bin:/sbin:/bin mount --bind \"" + net + "\" /proc/$$/net";
    }

    private List<String> javaOfNobody() {
        return Stream.concat(Tools.nobody().stream(),
                Tools.javaCommandForEveryone(directory.resolve("jars")).stream()).toList();
    }

    private Path procNet() throws IOException {
        Tools.requireRoot();
        Tools.openToEveryone(directory);
        return Files.createDirectory(directory.resolve("net"));
    }

    private static void replace(Path table, String content, String permissions) throws IOException {
        Path next = table.resolveSibling("next");
        Files.writeString(next, content, StandardCharsets.ISO_8859_1);
        Files.setPosixFilePermissions(next, PosixFilePermissions.fromString(permissions));
        Files.move(next, table, StandardCopyOption.ATOMIC_MOVE);
    }

    static Stream<Arguments> brokenTables() {
        return Stream.of("auto", "procfs").flatMap(source -> Stream.of("tcp", "unix").flatMap(file -> {
            String heading = file.equals("tcp") ? PROCFS_HEADING : PROCFS_UNIX_HEADING;
            String row = file.equals("tcp") ? PROCFS_LISTENER : PROCFS_UNIX_CONNECTION;
            return Stream.of(
                    Arguments.of(source, file, "absent", null, "/proc/net/" + file),
                    Arguments.of(source, file, "unreadable", heading, "/proc/net/" + file),
                    Arguments.of(source, file, "empty", "", "not a socket table"),
                    Arguments.of(source, file, "half", heading + row.substring(0, 40), "not a socket table"),
                    Arguments.of(source, file, "without heading", row, "not a socket table"),
                    Arguments.of(source, file, "garbage", heading + "\001\377\0\n", "not a socket table"));
        }));
    }

    @ParameterizedTest(name = "{0}: {1} {2}")
    @MethodSource("brokenTables")
    void theHookStaysUntilItCanTellWhenTheTableOfProcfsIs(String source, String file, String name, String table,
            String reason) throws IOException {
        Path net = procNet();
        replace(net.resolve("tcp"), PROCFS_HEADING + PROCFS_LISTENER, "r--r--r--");
        replace(net.resolve("unix"), PROCFS_UNIX_HEADING + PROCFS_UNIX_LISTENER, "r--r--r--");
        if (table == null) {
            Files.delete(net.resolve(file));
        } else {
            replace(net.resolve(file), table, name.equals("unreadable") ? "---------" : "r--r--r--");
        }
        List<String> command = withProcNet(net, javaOfNobody());
        try (Hook hook = Hook.run(command, environment(PORT, source))) {
            hook.awaitChecks("unknown", 5);
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(hook.messages("warning")).singleElement().asString().contains("Cannot tell", reason);

            replace(net.resolve("unix"), PROCFS_UNIX_HEADING + PROCFS_UNIX_CONNECTION, "r--r--r--");
            replace(net.resolve("tcp"), PROCFS_HEADING + PROCFS_LISTENER + PROCFS_CONNECTION, "r--r--r--");
            hook.awaitLog("1 connection to port " + PORT + " from " + PEER + " and 1 to " + SOCKET);
            int checks = Collections.frequency(hook.checks(), "unknown");
            replace(net.resolve("tcp6"), "garbage\n", "r--r--r--"); // the connections may be in the other table
            hook.awaitChecks("unknown", checks + 5);
            checks = Collections.frequency(hook.checks(), "unknown");
            replace(net.resolve("tcp6"), "", "---------");
            hook.awaitChecks("unknown", checks + 5);
            replace(net.resolve("tcp"), PROCFS_HEADING + PROCFS_LISTENER, "r--r--r--");
            replace(net.resolve("unix"), PROCFS_UNIX_HEADING + PROCFS_UNIX_LISTENER, "r--r--r--");
            replace(net.resolve("tcp6"), PROCFS_HEADING.replace("rem_", "remote_"), "r--r--r--");
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning")).as("each new reason").hasSize(3);
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"netstat", "ss", "procfs"})
    void theHookStaysWhileAllSourcesAreBrokenAndGoesOnWithTheOneThatComesBack(String mended) throws IOException {
        Path net = procNet();
        Path tools = Files.createDirectory(directory.resolve("tools"));
        Tools.openToEveryone(tools);
        Tools.stub(tools.resolve("netstat"), "exit 1");
        Tools.stub(tools.resolve("ss"), "echo garbage");
        replace(net.resolve("tcp"), "", "r--r--r--");
        replace(net.resolve("unix"), PROCFS_UNIX_HEADING + PROCFS_UNIX_LISTENER, "r--r--r--");
        Map<String, String> env = environment(PORT, "auto");
        env.put("PATH", tools.toString());
        List<String> command = withProcNet(net, javaOfNobody());
        try (Hook hook = Hook.run(command, env)) {
            hook.awaitChecks("unknown", 5);
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(hook.messages("warning")).satisfiesExactly(
                    line -> assertThat(line).contains("Could not use netstat: exit status 1"),
                    line -> assertThat(line).contains("Could not use ss: exit status 0, not a socket table: garbage"),
                    line -> assertThat(line).contains("Cannot tell", ": procfs: not a socket table"));
            if (mended.equals("procfs")) {
                replace(net.resolve("tcp"), PROCFS_HEADING + PROCFS_LISTENER + PROCFS_CONNECTION, "r--r--r--");
            } else {
                Tools.stub(tools.resolve(mended), Tool.valueOf(mended).busy(PORT));
            }
            hook.awaitLog("1 connection to port " + PORT + " from " + PEER);
            if (!mended.equals("procfs")) { // a tool is not believed that nobody is connected
                int before = Collections.frequency(hook.checks(), "unknown");
                Tools.stub(tools.resolve(mended), Tool.valueOf(mended).quiet(PORT));
                hook.awaitChecks("unknown", before + 5);
                assertThat(hook.process().isAlive()).isTrue();
            }
            replace(net.resolve("tcp"), PROCFS_HEADING + PROCFS_LISTENER, "r--r--r--");
            assertThat(hook.exitCode()).isZero();
        }
    }

    /** Such a kernel has no /proc/net/tcp6. BusyBox says so, and goes on. */
    @ParameterizedTest
    @ValueSource(strings = {"busybox", "netstat", "procfs"})
    void aKernelWithoutIpv6IsNoFault(String command) throws IOException {
        Path net = procNet();
        replace(net.resolve("tcp"), PROCFS_HEADING + PROCFS_LISTENER + PROCFS_CONNECTION, "r--r--r--");
        replace(net.resolve("unix"), PROCFS_UNIX_HEADING + PROCFS_UNIX_LISTENER, "r--r--r--");
        String source = command.equals("busybox") ? "netstat" : command;
        Map<String, String> env = environment(PORT, source);
        if (source.equals("netstat")) {
            Tools.stub(directory.resolve("netstat"), bind(net.toString()) + " && exec " + Tools.require(command)
                    + (command.equals("busybox") ? " netstat" : "") + " \"$@\"");
        }
        try (Hook hook = Hook.run(withProcNet(net, Hook.javaCommand()), env)) {
            hook.awaitLog("1 connection to port " + PORT + " from " + PEER + " and 0 to " + SOCKET);
            replace(net.resolve("tcp"), PROCFS_HEADING + PROCFS_LISTENER, "r--r--r--");
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("warning")).isEmpty();
        }
    }

    /** BusyBox's netstat ends with 0 and an empty table where there is no /proc/net. */
    @ParameterizedTest
    @ValueSource(strings = {"busybox auto", "busybox netstat", "netstat auto", "netstat netstat"})
    void theHookStaysWhereThereIsNoProcNetButANetstat(String commandAndSource) {
        Tools.requireRoot();
        String[] words = commandAndSource.split(" ");
        Map<String, String> env = environment(PORT, words[1]);
        env.put("PATH", Tools.only(directory.resolve("tools"), Map.of("netstat", Tools.require(words[0]))));
        List<String> subset = List.of(Tools.require("unshare").toString(), "--mount", "/bin/sh", "-c",
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin mount -t proc -o subset=pid proc /proc && exec \"$@\"", "sh");
        try (Hook hook = Hook.startWith(subset, env)) {
            hook.awaitChecks("unknown", 5);
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(hook.messages("warning")).last().asString().contains("Cannot tell");
        }
        try (Hook hook = Hook.startWith(subset, env, "--once")) {
            assertThat(hook.exitCode()).isEqualTo(1);
            assertThat(hook.out()).isEmpty();
        }
    }

    // ---- Helpers ---------------------------------------------------------------------------------------------------

    private Hook hook(int port, String source) { return Hook.start(environment(port, source)); }

    /** One wrong check is enough to leave, each check is logged, and the PATH is the test's directory. */
    private Map<String, String> environment(int port, String source) {
        Map<String, String> env = Hook.quick(port);
        env.put("WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", "0");
        env.put("DEBUG", "1");
        env.put("BUILDKITD_SOCKET", SOCKET);
        env.put("CONNECTION_SOURCE", source);
        env.put("PATH", directory.toString());
        return env;
    }

    private static int openFiles(Hook hook) {
        return Path.of("/proc", "" + hook.process().pid(), "fd").toFile().list().length;
    }

    private List<Long> pids() throws IOException {
        Path file = directory.resolve("pids");
        return Files.exists(file) ? Files.readAllLines(file).stream().map(Long::valueOf).toList() : List.of();
    }

    private void assertNoneOfThePidsRuns() throws IOException {
        List<Long> pids = pids();
        Hook.waitUntil("none of " + pids + " runs", () -> pids.stream().noneMatch(Tools::running));
    }

    private void endThePids() throws IOException { Tools.end(pids().stream()); }
}
