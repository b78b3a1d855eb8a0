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
        Hook start(int port, String... args) {
            Map<String, String> settings = Hook.env("BUILDKITD_PORT", port,
                    "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 0);
            settings.putAll(env);
            // Ctrl-C as in a terminal: tests in the background ignore it, and so do their children.
            return Hook.run(Stream.of(new String[] {"env", "--default-signal=INT"}, command, args)
                    .flatMap(Arrays::stream).toList(), settings);
        }

        @Override public String toString() { return name; }
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
                    "sh", "-c", "exec " + Hook.SCRIPT + " \"$@\"", "-"));
            ways.add(new Way("java " + version, java, env,
                    java.toString(), "-cp", Tools.picocli().toString(), Hook.SCRIPT.toString()));
        });
    }

    private static Stream<Way> ways() { return ways.stream(); }

    private static Hook start(Path helper, Map<String, String> env, String... args) {
        return Hook.run(Stream.concat(Stream.of(helper.toString()), Stream.of(args)).toList(), env);
    }

    /** JBang has compiled nothing yet, and is started four times at the same moment. */
    @ParameterizedTest
    @MethodSource("ways")
    void waitsAndLeavesAndEndsAtOnceOnSigtermAndCtrlCHoweverItWasStarted(Way way) throws IOException {
        boolean isFirstJdk = ways.indexOf(way) < 3; // with another one the signals are no matter
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = way.start(server.port()); Hook other = isFirstJdk ? way.start(server.port()) : hook) {
            hook.awaitLog("1 connection to port " + server.port());
            if (isFirstJdk) {
                assertEnds(way, other.awaitLog("1 connection to port " + server.port()), "TERM", 143);
                assertEnds(way, hook, "INT", 130);
            } else {
                processes(way, hook);
                build.close();
                assertThat(hook.exitCode()).isZero();
            }
        }
    }

    private static void assertEnds(Way way, Hook hook, String signal, int exitCode) throws IOException {
        List<ProcessHandle> all = processes(way, hook);
        Hook.run(List.of("sh", "-c", "kill -" + signal + " " + hook.process().pid()), Map.of());
        assertThat(hook.exitCode()).isEqualTo(exitCode);
        Hook.waitUntil("no process is left", () -> all.stream().noneMatch(ProcessHandle::isAlive));
    }

    /**
     * The process that was started, which is the hook's JVM now, and perhaps a tool. There is no second JVM, but for
     * the moment in which the child that will be a tool is still a copy of the hook.
     */
    private static List<ProcessHandle> processes(Way way, Hook hook) throws IOException {
        List<ProcessHandle> all = new ArrayList<>();
        Hook.waitUntil("there is one JVM", () -> {
            all.clear();
            Stream.concat(Stream.of(hook.process().toHandle()), hook.process().descendants()).forEach(all::add);
            return all.stream().filter(StartTest::isJvm).count() == 1;
        });
        assertThat(all.get(0).info().command()).hasValue(way.java.toRealPath().toString());
        return all;
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
        assertThat(hook.messages("warning")).singleElement().asString()
                .contains("nothing listens on port 1234 or buildkitd.sock");
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
                        "BUILDKITD_PORT", server.port(), "MAX_WAIT_SECONDS", 2))) {
            hook.awaitLog("1 connection to port " + server.port());
            assertThat(hook.exitCode()).isEqualTo(124);
        } finally {
            Files.delete(group);
        }
    }

    /** A HOME in which JBang has compiled nothing yet; what was fetched before is there, so no network is needed. */
    private static Map<String, String> emptyHome(Path home) {
        Tools.copyFetched(home.resolve(".jbang"), home.resolve(".m2/repository"));
        return Hook.env("HOME", home, "JBANG_DIR", home.resolve(".jbang"));
    }

    // ---- The helper ------------------------------------------------------------------------------------------------

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
        if (missing.equals("mvn")) { path += ":" + System.getProperty("java.home") + "/bin"; }
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
