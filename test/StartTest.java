import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import java.io.IOException;
import java.nio.file.*;
import java.util.*;
import java.util.function.Function;
import java.util.stream.*;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;

/** The ways to start the hook, and the helper that starts it where JBang is not installed. */
class StartTest {

    private static final Path HELPER = Hook.REPOSITORY.resolve("test/jbang");

    private static final List<Way> ways = new ArrayList<>();

    @TempDir
    static Path homes;
    @TempDir
    Path temp;

    /** A way that the README names, with one JDK: what stands before the hook's arguments, and the environment. */
    private record Way(String name, Path java, Map<String, String> env, String... command) {
        Hook start(Server server, String... args) {
            Map<String, String> settings = Hook.quick(server.port());
            settings.putAll(env);
            // Ctrl-C as in a terminal: tests in the background ignore it, and so do their children.
            return Hook.run(Stream.of(new String[] {"env", "--default-signal=INT"}, command, args)
                    .flatMap(Arrays::stream).toList(), settings);
        }

        @Override
        public String toString() { return name; }
    }

    @BeforeAll
    static void findWays() {
        Tools.jdks().forEach((version, jdk) -> {
            Path java = jdk.resolve("bin/java");
            // A home for each JDK, because JBang compiles anew what it finds compiled by a newer one.
            Map<String, String> env = emptyHome(homes.resolve(version));
            env.put("JAVA_HOME", jdk.toString());
            env.put("PATH", HELPER.getParent() + ":" + System.getenv("PATH"));
            ways.add(new Way("jbang with " + version, java, env, HELPER.toString(), Hook.SCRIPT.toString()));
            // Java's exec, like Kubernetes', does not start a file without #!, as a shell does.
            ways.add(new Way("./buildkit-prestop.java with " + version, java, env,
                    "sh", "-c", Hook.SCRIPT + " \"$@\"", "-"));
            ways.add(new Way("java " + version, java, env,
                    java.toString(), "-cp", Tools.picocli().toString(), Hook.SCRIPT.toString()));
        });
    }

    private static Stream<Way> ways() { return ways.stream(); }

    private static Hook start(Path helper, Map<String, String> env, String... args) {
        return Hook.run(Stream.concat(Stream.of(helper.toString()), Stream.of(args)).toList(), env);
    }

    @ParameterizedTest
    @MethodSource("ways")
    void waitsWithEverySourceAndLeavesWithTheHooksExitCodeHoweverItWasStarted(Way way) {
        Stream.of("netstat", "ss").forEach(Tools::require);
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook netstat = way.start(server, "--source=netstat"); Hook ss = way.start(server, "--source=ss");
                Hook procfs = way.start(server, "--source=procfs"); Hook mistaken = way.start(server, "--port=none")) {
            List<Hook> waiting = List.of(netstat, ss, procfs);
            for (Hook hook : waiting) {
                hook.awaitLog(" to port " + server.port());
                // A machine may be so busy that a tool has no answer in time, which only makes the hook stay.
                assertThat(hook.err())
                        .noneMatch(line -> line.contains("Cannot tell") && !line.contains("no answer in"));
                hook.awaitLog("1 connection to port " + server.port());
            }
            build.close();
            waiting.forEach(hook -> assertThat(hook.exitCode()).isZero());
            assertThat(mistaken.exitCode()).isEqualTo(2);
        }
    }

    @ParameterizedTest
    @MethodSource("ways")
    void endsAtOnceOnSigtermAndCtrlCHoweverItWasStarted(Way way) throws IOException {
        for (String signal : List.of("TERM", "INT")) {
            try (Server server = Server.start(); Server.Connection build = server.connect();
                    Hook hook = way.start(server)) {
                hook.awaitLog("1 connection to port " + server.port());
                // A shell may wait for ./buildkit-prestop.java, as it does for any command. There is no second JVM,
                // but for the moment in which the child that will be a tool is still a copy of the hook.
                List<ProcessHandle> all = new ArrayList<>();
                Hook.waitUntil("there is one JVM", () -> {
                    all.clear();
                    all.add(hook.process().toHandle());
                    hook.process().descendants().forEach(all::add);
                    return all.stream().filter(StartTest::isJvm).count() == 1;
                });
                ProcessHandle jvm = all.stream().filter(StartTest::isJvm).findAny().orElseThrow();
                assertThat(jvm.info().command()).hasValue(way.java.toRealPath().toString());
                Hook.run(List.of("sh", "-c", "kill -" + signal + " " + jvm.pid()), Map.of());
                assertThat(hook.exitCode()).isEqualTo(signal.equals("TERM") ? 143 : 130);
                Hook.waitUntil("no process is left", () -> all.stream().noneMatch(ProcessHandle::isAlive));
            }
        }
    }

    private static boolean isJvm(ProcessHandle process) {
        return process.info().command().orElse("").endsWith("/java");
    }

    @Test
    void runsFromAConfigMapForAnotherUserOnAReadOnlyFileSystemWithoutNetworkAndHome() throws IOException {
        Tools.requireRoot();
        Map<String, String> env = emptyHome(temp);
        env.put("JBANG_REPO", env.remove("HOME") + "/.m2/repository");
        Path helper = Files.copy(HELPER, temp.resolve("jbang"));
        // As a ConfigMap is mounted.
        Path data = Files.createDirectory(temp.resolve("..2026_11_23_12_00_00.123456789"));
        Files.copy(Hook.SCRIPT, data.resolve("buildkit-prestop.java"));
        Files.createSymbolicLink(temp.resolve("..data"), data.getFileName());
        Path script = Files.createSymbolicLink(temp.resolve("buildkit-prestop.java"),
                Path.of("..data/buildkit-prestop.java"));
        assertThat(start(helper, env, "build", script.toString()).exitCode()).isZero();
        Tools.openToEveryone(temp);
        List<String> asNobody = List.of("unshare", "--net", "--mount", "sh", "-c",
                "mount --bind $0 $0 && mount -o remount,ro,bind $0 && exec setpriv --reuid 65534 --regid 65534"
                        + " --clear-groups $0/jbang $0/buildkit-prestop.java --once", temp.toString());
        Hook hook = Hook.run(asNobody, env);
        assertThat(hook.exitCode()).isEqualTo(1);
        assertThat(hook.messages("warning")).singleElement().asString().contains("nothing listens on port 1234");
    }

    @Test
    void waitsWithinAMemoryLimitOf64MbFromAWarmCache() throws IOException {
        boolean version1 = Files.exists(Path.of("/sys/fs/cgroup/memory"));
        Path group = Path.of("/sys/fs/cgroup", version1 ? "memory" : "", "buildkit-prestop-" + System.nanoTime());
        String limit = version1 ? "echo 64M > $0/memory.limit_in_bytes"
                : "echo 64M > $0/memory.max && echo 0 > $0/memory.swap.max"; // else what is too much is swapped out
        assumeTrue(Hook.run(List.of("sh", "-c", "mkdir $0 && { " + limit + " || { rmdir $0; false; }; }",
                group.toString()), Map.of()).exitCode() == 0, "needs the right to make a cgroup with a memory limit");
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.run(List.of("sh", "-c", "echo $$ > $0/cgroup.procs && exec \"$@\"", group.toString(),
                        HELPER.toString(), Hook.SCRIPT.toString()), Hook.env("HOME", Tools.HOME,
                        "BUILDKITD_PORT", server.port(), "MAX_WAIT_SECONDS", 3))) {
            hook.awaitLog("1 connection to port " + server.port());
            assertThat(hook.exitCode()).isEqualTo(124);
        } finally {
            Files.delete(group);
        }
    }

    @Test
    void twoStartsAtTheSameMomentOnAColdCacheBothWork() {
        Map<String, String> env = emptyHome(temp);
        try (Server server = Server.start()) {
            env.put("BUILDKITD_PORT", String.valueOf(server.port()));
            Stream.generate(() -> start(HELPER, env, Hook.SCRIPT.toString(), "--once")).limit(4).toList()
                    .forEach(hook -> assertThat(hook.exitCode()).as(hook.err().toString()).isZero());
        }
    }

    /** A HOME in which JBang has compiled nothing yet; what was fetched before is there, so no network is needed. */
    private static Map<String, String> emptyHome(Path home) {
        Tools.copyFetched(home.resolve(".jbang"), home.resolve(".m2/repository"));
        return Hook.env("HOME", home, "JBANG_DIR", home.resolve(".jbang"));
    }

    @Test
    void theHelperTakesTheInstalledJBangAndNotItself() throws IOException {
        Path installed = Files.createDirectory(temp.resolve("bin")).resolve("jbang");
        Tools.stub(installed, "echo installed: \"$@\"\nexit 7\n");
        Path alias = Files.createSymbolicLink(Files.createDirectory(temp.resolve("alias")).resolve("jbang"), HELPER);
        String path = alias.getParent() + ":" + HELPER.getParent() + ":" + installed.getParent() + ":"
                + System.getenv("PATH");
        for (Path start : List.of(HELPER, alias)) {
            Hook hook = start(start, Hook.env("PATH", path), "run", "a b", "c");
            assertThat(hook.exitCode()).isEqualTo(7);
            assertThat(hook.out()).containsExactly("installed: run a b c");
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"java", "mvn"})
    void theHelperSaysWhatIsMissing(String missing) {
        String path = Tools.only(temp.resolve("bin"),
                Stream.of("sh", "env", "dirname", "mkdir", "getent", "id", "cut", "mktemp", "rm", "flock")
                        .collect(Collectors.toMap(Function.identity(), Tools::require)));
        if (missing.equals("mvn")) {
            path += ":" + System.getProperty("java.home") + "/bin";
        }
        Hook hook = start(HELPER, Hook.env("PATH", path, "HOME", temp), "--version");
        assertThat(hook.exitCode()).isEqualTo(127);
        assertThat(hook.err()).containsExactly("test/jbang: needs JBang, or a JDK 17 or newer and Maven:"
                + " there is no jbang and no " + missing);
    }

    @Test
    void theHelperPassesOnWhatJBangItselfPrintsAndItsExitCode() {
        Map<String, String> env = Hook.env("HOME", Tools.HOME);
        Hook version = start(HELPER, env, "--version");
        assertThat(version.exitCode()).isZero();
        assertThat(version.err()).last().asString().matches("\\d+\\.\\d+\\.\\d+.*");
        Hook wrong = start(HELPER, env, "no-such-file.java");
        assertThat(wrong.exitCode()).isNotZero();
        assertThat(wrong.err()).isNotEmpty();
    }
}
